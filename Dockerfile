# One image for the gateway, the ingestor, the projector and the tool that creates the topics; the command says which.

FROM python:3.11-slim-bookworm AS build
WORKDIR /app
COPY requirements.lock .
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.lock
COPY LICENSE .
COPY shared shared
COPY gateway gateway
COPY ingestor ingestor
COPY projector projector
RUN /venv/bin/python -m compileall -q .

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="episodes" \
      org.opencontainers.image.description="An event-sourced service for streams of episodes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
# A new volume takes over the owner of the folder it is mounted on.
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin episodes \
 && install -d -o episodes -g episodes /var/lib/episodes /var/lib/episodes-snapshots
COPY --from=build /venv /venv
COPY --from=build /app /app
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 INGESTOR_STATE_DIR=/var/lib/episodes
WORKDIR /app
USER episodes
EXPOSE 8080
CMD ["python", "-m", "gateway"]

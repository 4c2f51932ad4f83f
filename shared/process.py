"""What every process does around its main loop: logging, signals, a clean end."""

import asyncio
import ctypes
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable

import structlog
import uvloop
from structlog.tracebacks import ExceptionDictTransformer

from shared.settings import LogSettings

_WITHOUT_VALUES = ExceptionDictTransformer(show_locals=False)
"""A stack in a log shows no variables: they hold tokens, passwords and bodies."""


_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
"""Names of glibc's malloc.h."""
_LARGE_BUFFER = 1024 * 1024
_HEAPS = 2


def configure_logging(process: str) -> None:
    """Structured logs on stderr, for our own messages and for the libraries'."""
    settings = LogSettings()
    shared_processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[structlog.typing.Processor] = (
        [structlog.processors.ExceptionRenderer(_WITHOUT_VALUES), structlog.processors.JSONRenderer()]
        if settings.format == "json"
        else [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    structlog.configure(
        processors=[*shared_processors, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared_processors,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(handlers=[handler], level=settings.level, force=True)
    for chatty, level in {"aiokafka": logging.CRITICAL, "pymongo": logging.ERROR, "asyncio": logging.ERROR}.items():
        logging.getLogger(chatty).setLevel(level)  # what aiokafka says, a thousand times a second, reaches us as errors
    structlog.contextvars.bind_contextvars(process=process)


def run_process(main: Callable[[], Awaitable[None]]) -> None:
    """Run ``main`` until it ends or SIGTERM or SIGINT cancels it. An error ends the process with status 1."""
    tune_interpreter()
    tune_allocator()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_until_signal(main))


def tune_interpreter() -> None:
    """Set what Python's defaults get wrong for a process that moves many messages (`python -m bench.projector`).

    The garbage collector looks less often: messages have no cycles, and it cost the projector a sixth of its CPU. And a
    thread that is back from the network with an answer takes its turn after 0.5 ms, not 5: the event loop, busy with
    the next batch, kept MongoDB waiting between any two statements of a transaction.
    """
    gc.freeze()  # what was imported stays
    gc.set_threshold(50_000, 20, 100)
    sys.setswitchinterval(0.0005)


def tune_allocator() -> None:
    """Have glibc give large buffers back to the system as soon as they are free (`python -m bench.overload`).

    By itself it keeps them, the more the larger they were, and a heap for each thread: after some messages of 6 MiB a
    gateway stayed at three times its size. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BUFFER)
        mallopt(_M_ARENA_MAX, _HEAPS)


async def _until_signal(main: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.ensure_future(main())
    loop = asyncio.get_running_loop()
    stopping = False

    def stop() -> None:
        nonlocal stopping
        stopping = True
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not stopping:
            raise

"""One write: dispatch its command, await what it came to, answer."""

from starlette.responses import Response

from gateway import answers
from gateway.dispatch import Dispatcher
from gateway.exchange import WriteOptions, header_text, json_answer
from gateway.problems import refusal
from gateway.reads import Reads
from shared.commands import Command
from shared.receipts import CommandRefused


class Writes:
    """Every write goes through here, whatever its resource."""

    def __init__(self, dispatcher: Dispatcher, reads: Reads) -> None:
        self._dispatcher = dispatcher
        self._reads = reads

    def check(self, caller: str) -> None:
        """See whether one more write of this caller would be taken now, before its body is read.

        Raises:
            EpisodesError: as `Dispatcher.check` says.
        """
        self._dispatcher.check(caller)

    async def answer(self, command: Command, options: WriteOptions) -> Response:
        """The answer to the write.

        Raises:
            Problem: the ingestor refused it.
            EpisodesError: as `Dispatcher.dispatch` says.
        """
        receipt = await self._dispatcher.dispatch(command, options.traceparent)
        self._reads.remember(receipt.stream, receipt.event_id)
        headers = {"X-Event-Id": str(receipt.event_id), "X-Stream": header_text(receipt.stream)}
        if isinstance(receipt.outcome, CommandRefused):
            problem = refusal(receipt.outcome)
            problem.headers |= headers
            raise problem
        if receipt.replayed:
            headers["Idempotency-Replayed"] = "true"
        if options.wait_projected:
            projected = await self._reads.wait_projected(command.actor, receipt.stream, receipt.event_id)
            headers["X-Projected"] = "true" if projected else "false"
        status, body = answers.outcome(receipt.outcome)
        return json_answer(body, status, headers)

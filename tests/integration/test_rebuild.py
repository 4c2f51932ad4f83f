"""Rebuilding while serving: the same documents whatever is killed, one switch, a way back, and nobody notices."""

import asyncio
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import msgspec
import psutil
import pytest
from bson import encode

import projector.rebuild
from projector import generations
from projector.generations import WrongGeneration
from projector.rebuild import RebuildFailed, Rebuilt, rebuild
from projector.replay import Plan
from projector.views import Documents, no_documents, project, stream_of
from shared.ids import StreamId
from tests.read_models import Command, ReadModels, until

LOADING = "loading partition"
RANGES = 40


async def build_of(models: ReadModels) -> dict[str, Any]:
    """What the rebuild that is at work, or was, noted of itself."""
    found = await generations.being_built(models.client)
    assert found is not None
    build: dict[str, Any] = found["build"]
    return build


def documents_of(models: ReadModels) -> Documents:
    """What the logs come to."""
    documents = no_documents()
    for log in models.logs.values():
        for logged in log.events:
            project(documents, logged)
    return documents


def expected(models: ReadModels) -> dict[str, list[bytes]]:
    """What the logs come to, as it is stored."""
    return {name: sorted(encode(one) for one in there.values()) for name, there in documents_of(models).items()}


async def rebuild_here(models: ReadModels) -> Rebuilt:
    """Rebuild from this process."""
    return await rebuild(
        models.client,
        models.mongo,
        models.kafka,
        models.folder,
        workers=1,
        most_lag=None,
        dry_run=False,
        report=lambda phase, done, of: None,
    )


async def inserted(models: ReadModels) -> int:
    status = await models.client.admin.command("serverStatus")
    return int(status["opcounters"]["insert"])


async def test_the_rebuilt_generation_is_byte_for_byte_the_live_one_and_the_old_one_is_kept(models: ReadModels) -> None:
    histories = models.histories(300)
    await models.write()
    async with models.followed():
        await models.applied(1)
        said = await models.cli("rebuild", "--json", "--workers", "1")
        assert said.status == 0, said
        events = sum(len(log.events) for log in models.logs.values())
        rebuilt = said.json
        assert (rebuilt["generation"], rebuilt["previous"], rebuilt["switched"]) == (2, 1, True)
        assert (rebuilt["verdict"]["events"], rebuilt["verdict"]["different"]) == (events, 0)
        assert await generations.in_use(models.client) == 2
        assert await models.content(2) == await models.content(1) == expected(models)
        indexes = [await models.database(number).project_episodes.index_information() for number in (1, 2)]
        assert indexes[0] == indexes[1]

        for history in histories:
            for _ in range(30):
                history.step()
        await models.write()
        await models.applied(1)
        await models.applied(2)
        assert await models.content(2) == await models.content(1) == expected(models)

        back = await models.cli("rollback")
        assert (back.status, back.out) == (0, "generation 1 is in use again; 2 is kept up to date\n")
        forth = await models.cli("rollback")
        assert (forth.status, forth.out) == (0, "generation 2 is in use again; 1 is kept up to date\n")
        listed = await models.cli("generations", "--json")
        position = sum(log.position for log in models.logs.values())
        assert [
            (
                each["number"],
                each["state"],
                each["in_use"],
                sum(checkpoint["cursor"]["position"] for checkpoint in each["checkpoints"].values()),
            )
            for each in listed.json
        ] == [(1, "live", False, position), (2, "live", True, position)]
        assert all(each["bytes"] > 0 for each in listed.json)
        assert listed.json[0]["verified"] is None
        assert 0 < listed.json[1]["verified"]["position"] < position, "as it was when the rebuild verified it"

        for number in (1, 2):
            assert (await models.cli("verify", "--generation", str(number))).status == 0
        verified = [each["verified"] for each in (await models.cli("generations", "--json")).json]
        assert [each["position"] for each in verified] == [position, position]
        assert verified[0]["hash"] == verified[1]["hash"] != listed.json[1]["verified"]["hash"]
        await models.database(2).projects.update_one({}, {"$inc": {"total": 1}})
        assert (await models.cli("verify")).status == 1
        assert "it differed from the log, at position" in " ".join((await models.cli("generations")).out.split())


async def test_one_generation_can_be_dropped_but_never_the_one_in_use(models: ReadModels) -> None:
    histories = [models.history(0), models.history(1)]  # the third partition is empty
    for history in histories:
        for _ in range(50):
            history.step()
    await models.write()
    async with models.followed():
        await models.applied(1)
        assert (await rebuild_here(models)).generation == 2
        refused = await models.cli("drop", "2")
        assert refused.status == 1
        assert refused.err == "python -m projector drop: generation 2 is in use: switch or roll back first\n"
        with pytest.raises(WrongGeneration, match="there is no generation 7"):
            await generations.drop(models.client, 7)

        await generations.drop(models.client, 1)
        models.history(2).step()  # the first events of a partition make its checkpoint, where it is followed
        await models.write()
        await models.applied(2)
        for history in histories:
            history.step()
        await models.write()
        await models.applied(2)
        assert await models.databases() == {"episodes_g2"}
        assert await models.content(2) == expected(models)
        assert (await models.verdict(2)).good
        late = await models.cli("rollback")
        assert (late.status, late.err) == (
            1,
            "python -m projector rollback: no generation is kept from before 2\n",
        )


async def test_there_is_no_way_back_in_time(models: ReadModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "_CATCH_UP_SECONDS", 0.3)
    [history, *_] = models.histories(5)
    await models.write()
    await models.project()
    assert (await rebuild_here(models)).generation == 2
    history.log.note()
    await models.write()
    await models.project(2)
    with pytest.raises(WrongGeneration, match="generation 1 is 1 events behind 2"):
        await generations.roll_back(models.client)
    assert await generations.in_use(models.client) == 2
    await models.project(1)
    assert await generations.roll_back(models.client) == (2, 1)


async def test_a_dry_run_builds_and_verifies_and_leaves_all_as_it_was(models: ReadModels) -> None:
    models.histories(60)
    await models.write()
    async with models.followed():
        await models.applied(1)
        said = await models.cli("rebuild", "--dry-run", "--workers", "1")
        assert said.status == 0, said
        assert said.out.startswith("generation 2 was built, verified and dropped again: ")
        assert await generations.in_use(models.client) == 1
        assert [each.number for each in await generations.all_generations(models.client)] == [1]
        assert await models.databases() == {"episodes_g1"}


@asynccontextmanager
async def stuck_half_way(models: ReadModels, *, workers: int = 1) -> AsyncIterator[Command]:
    """A rebuild that stands still in the middle of a range: somebody holds a document of it. Other workers are idle."""
    plan = Plan({}, RANGES)
    events = Counter(plan.range_of(logged.stream) for log in models.logs.values() for logged in log.events)
    longest_first = sorted(events, key=lambda number: (-events[number], number))
    half = len(longest_first) // 2
    stream = next(key for key in documents_of(models)["streams"] if plan.range_of(StreamId(key)) == longest_first[half])
    before = {*longest_first[:half]} if workers == 1 else {*range(RANGES)} - {longest_first[half]}
    run = await models.start("rebuild", "--json", "--workers", str(workers))
    await run.reached("reading partition")
    async with await models.client.start_session() as session, session.start_transaction():
        await models.database(2).streams.insert_one({"_id": stream}, session=session)

        async def stuck() -> bool:
            return before <= {*(await build_of(models))["loaded"]}

        await until(stuck, "half of the ranges to be loaded")
        yield run
        await session.abort_transaction()

    async def nothing_under_way() -> bool:
        found = await models.client.admin.command("currentOp", ns="episodes_g2.streams", op="insert")
        return not found["inprog"]

    await until(nothing_under_way, "the server to be done with what a process that is gone had sent")


async def killed(models: ReadModels, run: Command) -> None:
    """Kill a rebuild."""
    workers = psutil.Process(run.process.pid).children(recursive=True)
    await run.kill()

    async def ended() -> bool:
        return not any(worker.is_running() for worker in workers)

    await until(ended, "its workers to end by themselves", within=10)
    await models.forget_heartbeat()


async def killed_at(models: ReadModels, phase: str) -> None:
    """Start a rebuild, and kill it when it is there."""
    run = await models.start("rebuild", "--json", "--workers", "1")
    await run.reached(phase)
    await killed(models, run)


async def test_killed_in_each_phase_it_goes_on_and_comes_to_the_same(models: ReadModels) -> None:
    models.histories(300)
    await models.write()
    async with models.followed():
        await models.applied(1)
        await killed_at(models, "reading partition")
        async with stuck_half_way(models) as run:
            await killed(models, run)
        build = await build_of(models)
        plan = msgspec.json.decode(build["plan"], type=Plan)
        ranges = [
            plan.range_of(StreamId(stream_of(name, document)))
            for name, there in documents_of(models).items()
            for document in there.values()
        ]
        left = [number for number in ranges if number not in build["loaded"]]
        assert 0 < len(left) < len(ranges)
        before = await inserted(models)
        await killed_at(models, "building")
        assert await inserted(models) - before == len(left), "no range is loaded again"
        await killed_at(models, "catching up")
        assert await generations.live(models.client) == {1, 2}
        await killed_at(models, "comparing")
        said = await models.cli("rebuild", "--json", "--workers", "1")
        assert said.status == 0, said
        assert not any(told["phase"].startswith(LOADING) for told in said.progress)
        assert (said.json["generation"], said.json["switched"]) == (2, True)
        assert await models.content(2) == await models.content(1) == expected(models)
        assert not [*models.folder.glob("episodes-rebuild/*")], "what was spilled is removed"


async def test_a_kill_is_noticed_without_being_told(models: ReadModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projector.rebuild, "_ALIVE", timedelta(seconds=3))
    models.histories(20)
    await models.write()
    await models.project()
    run = await models.start("rebuild", "--json")
    await run.reached(LOADING)
    await run.kill()
    rebuilt = await rebuild_here(models)
    assert (rebuilt.generation, rebuilt.switched) == (2, True)


async def test_ctrl_c_ends_it_in_a_word_and_it_goes_on_at_once(models: ReadModels) -> None:
    models.histories(60)
    await models.write()
    async with models.followed():
        await models.applied(1)
        async with stuck_half_way(models, workers=2) as run:
            for worker in psutil.Process(run.process.pid).children():
                worker.send_signal(signal.SIGINT)  # a terminal sends it to all of them, in any order
            beat = (await build_of(models))["heartbeat_at"]

            async def beats() -> bool:
                return bool((await build_of(models))["heartbeat_at"] != beat)

            await until(beats, "it to go on as if nothing had happened")
            run.send(signal.SIGINT)
            stopped = await run.said()
        assert stopped.status == 130
        assert "Traceback" not in stopped.err
        assert stopped.err.splitlines()[-1] == "python -m projector rebuild: interrupted; call it again to go on"
        build = await build_of(models)
        assert build["heartbeat_at"].year == 1970, "nobody has to wait until it counts as dead"
        assert 0 < len(build["loaded"]) < RANGES
        said = await models.cli("rebuild", "--json", "--workers", "1")
        assert said.status == 0, said
        first = {told["phase"]: told["done"] for told in reversed(said.progress) if told["phase"].startswith(LOADING)}
        assert any(first.values()), "it does not begin at nothing"
        assert await models.content(2) == await models.content(1) == expected(models)


async def test_it_holds_still_while_readers_wait_for_news_and_a_second_one_is_refused(models: ReadModels) -> None:
    models.histories(60)
    await models.write()
    await generations.prepare(models.client)  # and no projector applies anything
    first = await models.start("rebuild", "--json", "--throttle", "0")
    await first.reached("reading partition")
    for _ in range(2):
        second = await models.cli("rebuild", "--workers", "1")
        assert second.status == 1
        assert re.fullmatch(
            r"python -m projector rebuild: generation 2 is being built already: "
            r"(it just began|(holding still .* \(\d+ records more\); )?reading partition \d), \d+ of \d+\n",
            second.err,
        ), second.err
    build = await build_of(models)
    assert build["loaded"] == []
    assert re.match(r"holding still until .* \([1-9]\d* records more\); reading partition", build["phase"]), build[
        "phase"
    ]
    async with models.followed():
        said = await first.said()
        assert said.status == 0, said
        held = [told for told in said.progress if told["phase"].startswith("holding still")]
        assert held[0]["done"] == 0 < held[0]["of"]
        assert await models.content(2) == await models.content(1) == expected(models)


async def test_without_a_projector_it_says_so_and_is_finished_later(
    models: ReadModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projector.rebuild, "_NO_PROJECTOR_SECONDS", 0.5)
    histories = models.histories(60)
    await models.write()
    await models.project()
    await killed_at(models, LOADING)
    for history in histories:
        history.step()
    await models.write()
    await models.project()  # the last that the projector did
    for _ in range(2):
        with pytest.raises(RebuildFailed, match=r"generation 2 is loaded and .* events behind, and no projector runs"):
            await rebuild_here(models)
        assert await generations.in_use(models.client) == 1
    async with models.followed():
        assert (await rebuild_here(models)).switched
    assert await generations.in_use(models.client) == 2
    assert await models.content(2) == await models.content(1) == expected(models)


async def test_with_all_of_mongodb_lost_it_needs_no_projector(models: ReadModels) -> None:
    models.histories(20)
    await models.write()
    assert (await rebuild_here(models)).switched
    assert await models.content(2) == expected(models)


async def test_what_is_not_as_the_log_says_is_not_put_to_use(models: ReadModels) -> None:
    models.histories(60)
    await models.write()
    await models.project()
    await killed_at(models, "catching up")
    broken = await models.database(2).streams.find_one_and_delete({})
    said = await models.cli("rebuild", "--workers", "1")
    assert said.status == 1
    assert f"MISSING  streams/{broken['_id']}  of {broken['_id']}\n" in said.out
    assert said.err.splitlines()[-1] == (
        "python -m projector rebuild: generation 2 is not as the log says, and is not put to use; "
        "look at the differences, then drop it (drop 2) or verify it again (rebuild)"
    )
    assert await generations.in_use(models.client) == 1
    await models.database(2).streams.insert_one(broken)
    assert (await rebuild_here(models)).generation == 2


async def test_what_a_dropped_rebuild_left_is_not_taken_for_the_next_one_s(models: ReadModels) -> None:
    models.histories(60)
    await models.write()
    await models.project()
    await killed_at(models, LOADING)
    await generations.drop(models.client, 2)
    await models.database(2).folders.insert_one({"_id": "a worker that had not heard of it wrote this"})
    await models.client.drop_database("episodes_g1")
    await models.begin_anew()  # the log of before, restored from an archive, say
    models.histories(70, content_bytes=50)
    await models.write()
    await models.project()
    said = await models.cli("rebuild", "--workers", "1")
    assert said.status == 0, said
    assert await models.content(2) == expected(models)


async def test_one_that_was_replaced_does_not_hand_over_what_is_handed_over_already(models: ReadModels) -> None:
    [history, *_] = models.histories(20)
    await models.write()
    await models.project()
    await killed_at(models, "building")
    frozen = await build_of(models)
    checkpoints = await generations.checkpoints(models.client, 1)
    assert (await rebuild_here(models)).generation == 2
    history.step()
    await models.write()
    await models.project(2)
    with pytest.raises(WrongGeneration):
        await generations.enliven(models.client, 2, frozen["owner"], checkpoints)
    assert await generations.checkpoints(models.client, 2) != checkpoints


async def test_a_generation_in_use_is_not_dropped_by_somebody_who_looked_before_the_switch(models: ReadModels) -> None:
    models.histories(5)
    await models.write()
    assert (await rebuild_here(models)).generation == 2
    outcomes = await asyncio.gather(
        generations.drop(models.client, 1),
        generations.switch(models.client, old=2, new=1),
        return_exceptions=True,
    )
    assert sum(outcome is None for outcome in outcomes) == 1, outcomes
    assert await generations.in_use(models.client) in await generations.live(models.client)

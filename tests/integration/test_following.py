"""A projector keeps every generation up to date: it takes up what appears and lets go of what is dropped."""

import asyncio
from typing import Any

from local.process import ManagedProcess
from local.servers import free_port
from local.services import make_service
from projector import generations
from projector.documents import Checkpoint
from projector.following import Following
from projector.settings import ProjectorSettings
from shared.mongo import META
from shared.probes import Status
from tests.read_models import PARTITIONS, ReadModels, until


async def appear(models: ReadModels) -> int:
    """Hand a generation over, as a rebuild does with one that it loaded; this one is empty."""
    number = await generations.begin(models.client, {"owner": "test"})
    await generations.create_collections(models.client, number)
    await generations.create_indexes(models.client, number)
    await generations.enliven(models.client, number, "test", {each: Checkpoint() for each in range(PARTITIONS)})
    return number


async def test_a_generation_that_appears_is_followed_and_one_that_is_dropped_let_go_of(models: ReadModels) -> None:
    histories = models.histories(50)
    await models.write()
    process: ManagedProcess = make_service(
        "projector", models.folder, name="projector", port=free_port(), env=models.servers.env
    )
    process.start()
    try:
        await models.applied(1)
        assert await appear(models) == 2
        await models.applied(2, within=10)
        assert await models.content(2) == await models.content(1)
        await asyncio.gather(*(generations.drop(models.client, 2), asyncio.to_thread(process.wait_ready)))
        for _ in range(3):
            for history in histories:
                history.step()
            await models.write()
            await models.applied(1)
        assert await models.databases() == {"episodes_g1"}
        assert process.missing() is None, "it is ready"
        assert "stopped" not in process.log_tail()
    finally:
        process.stop()


async def test_a_generation_that_is_still_built_is_left_alone(models: ReadModels) -> None:
    models.histories(5)
    await models.write()
    async with models.followed() as following:
        await generations.begin(models.client, {"owner": "test"})
        await generations.create_collections(models.client, 2)
        await models.applied(1)
        await following._look()
        assert await generations.checkpoints(models.client, 2) == {}


async def test_what_it_says_of_itself_is_about_the_generation_in_use_and_its_own_partitions(models: ReadModels) -> None:
    models.histories(5)
    await models.write()
    assert await appear(models) == 2
    status = Status()
    following = Following(models.client, models.kafka, ProjectorSettings(), status)
    await following.begin()
    work = [asyncio.create_task(following.run_partition(partition)) for partition in range(PARTITIONS)]
    looking = asyncio.create_task(following.look_on())

    def generations_said() -> Any:
        return status.details["generations"]

    async def says(expected: dict[str, str]) -> bool:
        return status.partitions == {int(number): state for number, state in expected.items()} and (
            generations_said() == {"1": expected, "2": expected}
        )

    running = {str(partition): Status.RUNNING for partition in range(PARTITIONS)}
    await until(lambda: says(running), "all of them to run")
    work[0].cancel()  # another projector has the partition now
    await asyncio.wait([work[0]])
    status.partitions.pop(0, None)
    await generations.switch(models.client, old=1, new=2)
    del running["0"]
    await until(lambda: says(running), "the partition to be forgotten")
    for task in (looking, *work):
        task.cancel()
    await asyncio.wait([looking, *work])


async def test_after_all_of_mongodb_is_lost_it_begins_at_the_start_of_the_log(models: ReadModels) -> None:
    histories = models.histories(20)
    await models.write()
    async with models.followed():
        await models.applied(1)
        assert await appear(models) == 2
        before = await models.content(1)
        for database in (*await models.databases(), META):
            await models.client.drop_database(database)
        await models.applied(1)
        assert await models.content(1) == before
        assert await generations.live(models.client) == {1}
        histories[0].step()
        await models.write()
        await models.applied(1)
        assert await models.content(1) != before

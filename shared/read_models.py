"""The read models' layout in MongoDB: what the projector writes and the gateway reads.

One generation is one database. Times are BSON dates. ``metadata`` is JSON *text*, exactly as in the event: BSON cannot
hold every JSON value (integers over 64 bits, NUL in keys, deep nesting), and nobody queries inside it.

=================  ==========================================================================================
collection         document
=================  ==========================================================================================
namespaces         ``_id`` (24 hex), slug, created_at
projects           ``_id`` (24 hex), namespace (slug), slug, name, created_at, total (living episodes),
                   blocks (living episodes per `BLOCK` ordinals: ``blocks[i]`` counts those with
                   ``i * BLOCK < ordinal <= (i + 1) * BLOCK``)
folders            ``_id`` (24 hex), namespace, project (slugs), project_id, parent_id, name, path, created_at
project_episodes   ``_id`` (24 hex), namespace, project (slugs), project_id, ordinal, name, description, tags,
                   status, write_protected, folder ({id, path} or null), metadata, created_at, updated_at,
                   deleted (bool), deleted_at, event_id (of its last event)
tenant_episodes    ``_id`` (``ep_…``), tenant_id, namespace, event_id, type, content, source, author, channel,
                   timestamp, metadata, entities ([{id, name, type}]), status, created_at
entities           ``_id`` (``<tenant_id>/<ent_…>``), tenant_id, entity_id, name, type, mentions,
                   first_event_id, last_event_id
streams            ``_id`` (stream), event_id (the last one applied), at
checkpoints        ``_id`` (partition), position, offset, fence; stopped ({offset, reason, at}) while stopped
=================  ==========================================================================================

``episodes_meta.pointers`` holds ``{_id: "generation", generation: N}``: the database in use is ``episodes_g<N>``.
``episodes_meta.generations`` lists all of them, and ``episodes_meta.projector_sessions`` the projectors' sessions, so
that one whose process is gone can be ended.
"""

NAMESPACES = "namespaces"
PROJECTS = "projects"
FOLDERS = "folders"
PROJECT_EPISODES = "project_episodes"
TENANT_EPISODES = "tenant_episodes"
ENTITIES = "entities"
STREAMS = "streams"
CHECKPOINTS = "checkpoints"

POINTERS = "pointers"
POINTER_ID = "generation"

BLOCK = 1_000
"""Ordinals per entry of ``blocks``: a page is found by summing block counts and skipping less than one block."""

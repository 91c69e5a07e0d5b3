"""Run by Alembic for each of its commands, on the connection that the caller opened."""

from alembic import context

from fedia3.coordinator.migrations import VERSION_TABLE
from fedia3.coordinator.stores import sql, sql_directory  # noqa: F401 they declare the tables
from fedia3.coordinator.stores.engine import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,  # SQLite changes a table by rebuilding it
)
with context.begin_transaction():
    context.run_migrations()

"""Brings a registry's database to the schema this version of fedia3 knows.

Our versions are counted in a table of our own, so that the database may be shared with tools that
use Alembic's default name.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from fedia3.errors import BadInput

VERSION_TABLE = "fedia3_alembic_version"


def migrate(connection: Connection) -> None:
    """Upgrade to the newest schema inside the connection's open transaction.

    On SQLite foreign keys have to be off on this connection: a table that a migration rebuilds
    would otherwise take the rows that refer to it along.

    Raises:
        BadInput: the database was written by a newer fedia3.
    """
    config = alembic_config(connection)
    scripts = ScriptDirectory.from_config(config)
    current = current_revision(connection)
    if current == scripts.get_current_head():
        return
    if current not in {None, *(script.revision for script in scripts.walk_revisions())}:
        raise BadInput(
            f"this registry has schema {current}, newer than {scripts.get_current_head()}, the "
            "newest this fedia3 knows; update fedia3"
        )
    command.upgrade(config, "head")


def current_revision(connection: Connection) -> str | None:
    """The schema's revision, None for an empty database."""
    options = {"version_table": VERSION_TABLE}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


def alembic_config(connection: Connection) -> Config:
    """What Alembic's commands need to work on this connection; there is no ini file."""
    config = Config()
    here = str(Path(__file__).parent).replace("%", "%%")  # Config interpolates
    config.set_main_option("script_location", here)
    config.attributes["connection"] = connection
    return config

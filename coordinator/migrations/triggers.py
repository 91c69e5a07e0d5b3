"""Triggers as each database spells them; a migration that makes a table calls them."""

from alembic import op

_FUNCTION = """
CREATE FUNCTION fedia3_never_changes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% rows never change', TG_TABLE_NAME
        USING ERRCODE = 'integrity_constraint_violation';
END $$
"""


def prepare() -> None:
    """What the triggers need besides their tables; once, in the first migration."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(_FUNCTION)


def forbid_updates(table: str) -> None:
    """Refuse every change of this table's rows, whoever asks; it goes with the table."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            f"CREATE TRIGGER {table}_immutable BEFORE UPDATE ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION fedia3_never_changes()"
        )
    else:
        op.execute(
            f"CREATE TRIGGER {table}_immutable BEFORE UPDATE ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} rows never change'); END"
        )


def clear_away() -> None:
    """Undo :func:`prepare`, once all tables are gone."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION fedia3_never_changes()")

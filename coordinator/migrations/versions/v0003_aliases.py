"""Aliases with their history, yanked versions, and a count of what changed on each line."""

import sqlalchemy as sa
from alembic import op

from fedia3.coordinator.migrations import triggers

_BY_CODE_POINT = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """What was published so far counts as one change each."""
    op.add_column(
        "adapter", sa.Column("revision", sa.BigInteger(), nullable=False, server_default="0")
    )
    op.execute("UPDATE adapter SET revision = next_version - 1")
    op.create_table(
        "yank",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", "version", name="pk_yank"),
        sa.ForeignKeyConstraint(
            ["adapter_id", "version"],
            ["adapter_version.adapter_id", "adapter_version.version"],
            name="fk_yank_adapter_id_adapter_version",
            ondelete="RESTRICT",
        ),
    )
    op.create_table(
        "alias_event",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("name", _BY_CODE_POINT, nullable=False),
        sa.Column("rev", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", "name", "rev", name="pk_alias_event"),
        sa.ForeignKeyConstraint(
            ["adapter_id"],
            ["adapter.id"],
            name="fk_alias_event_adapter_id_adapter",
            ondelete="RESTRICT",
        ),
        sa.ForeignKeyConstraint(
            ["adapter_id", "version"],
            ["adapter_version.adapter_id", "adapter_version.version"],
            name="fk_alias_event_adapter_id_adapter_version",
            ondelete="RESTRICT",
        ),
    )
    triggers.forbid_updates("alias_event")


def downgrade() -> None:
    """Aliases and yanks are lost."""
    op.drop_table("alias_event")
    op.drop_table("yank")
    op.drop_column("adapter", "revision")

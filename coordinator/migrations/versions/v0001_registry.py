"""Adapters with their versions, rounds with their contributions, the server state."""

import sqlalchemy as sa
from alembic import op

from fedia3.coordinator.migrations import triggers

revision = "0001"
down_revision = None

_IMMUTABLE = ("adapter_version", "round", "contribution")
_BY_CODE_POINT = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")


def upgrade() -> None:
    """From an empty database."""
    op.create_table(
        "adapter",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("owner_kind", sa.String(16), nullable=False),
        sa.Column("owner_name", _BY_CODE_POINT, nullable=False),
        sa.Column("base", sa.String(64), nullable=False),
        sa.Column("next_version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_adapter"),
        sa.UniqueConstraint("owner_kind", "owner_name", "base", name="uq_adapter_owner_kind"),
    )
    op.create_table(
        "adapter_version",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("form", sa.String(16), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("schema_digest", sa.String(64), nullable=False),
        sa.Column("round_num", sa.BigInteger(), nullable=False),
        sa.Column("num_examples", sa.BigInteger(), nullable=False),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.Column("parent", sa.String(64), nullable=True),
        sa.Column("global_digest", sa.String(64), nullable=True),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("idem_key", sa.String(128), nullable=True),
        sa.PrimaryKeyConstraint("adapter_id", "version", name="pk_adapter_version"),
        sa.UniqueConstraint("adapter_id", "idem_key", name="uq_adapter_version_adapter_id"),
        sa.ForeignKeyConstraint(
            ["adapter_id"],
            ["adapter.id"],
            name="fk_adapter_version_adapter_id_adapter",
            ondelete="RESTRICT",
        ),
    )
    op.create_index("ix_adapter_version_digest", "adapter_version", ["digest", "adapter_id"])
    op.create_table(
        "round",
        sa.Column("round_num", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.Column("committed_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("round_num", name="pk_round"),
        sa.ForeignKeyConstraint(
            ["adapter_id", "version"],
            ["adapter_version.adapter_id", "adapter_version.version"],
            name="fk_round_adapter_id_adapter_version",
            ondelete="RESTRICT",
        ),
    )
    op.create_table(
        "contribution",
        sa.Column("round_num", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("client", sa.String(128), nullable=False),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("num_examples", sa.BigInteger(), nullable=False),
        sa.Column("norm", sa.Double(), nullable=True),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("round_num", "client", name="pk_contribution"),
        sa.ForeignKeyConstraint(
            ["round_num"],
            ["round.round_num"],
            name="fk_contribution_round_num_round",
            ondelete="RESTRICT",
        ),
    )
    op.create_table(
        "server_state",
        sa.Column("round_num", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("round_num", name="pk_server_state"),
        sa.ForeignKeyConstraint(
            ["round_num"],
            ["round.round_num"],
            name="fk_server_state_round_num_round",
            ondelete="RESTRICT",
        ),
    )
    triggers.prepare()
    for table in _IMMUTABLE:
        triggers.forbid_updates(table)


def downgrade() -> None:
    """Back to an empty database; triggers go with their tables."""
    for table in ("server_state", "contribution", "round", "adapter_version", "adapter"):
        op.drop_table(table)
    triggers.clear_away()

"""Devices, their tokens and invites, nonces of signed requests, the operator's word on rounds."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """New tables beside the registry's."""
    op.create_table(
        "device",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("device_id", sa.String(64), nullable=False),
        sa.Column("user_name", sa.String(128), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("signing_key", sa.LargeBinary(), nullable=False),
        sa.Column("node_key", sa.LargeBinary(), nullable=False),
        sa.Column("enrolled_ms", sa.BigInteger(), nullable=False),
        sa.Column("revoked_ms", sa.BigInteger(), nullable=True),
        sa.Column("last_seen_ms", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_device"),
        sa.UniqueConstraint("device_id", name="uq_device_device_id"),
        sa.UniqueConstraint("signing_key", name="uq_device_signing_key"),
        sa.UniqueConstraint("node_key", name="uq_device_node_key"),
    )
    op.create_table(
        "token",
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("principal", sa.String(128), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.Column("signing_key", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("sha256", name="pk_token"),
    )
    op.create_index("ix_token_principal", "token", ["principal"])
    op.create_table(
        "invite",
        sa.Column("code_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("user_name", sa.String(128), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.Column("challenge", sa.LargeBinary(), nullable=False),
        sa.Column("device_id", sa.String(64), nullable=True),
        sa.PrimaryKeyConstraint("code_sha256", name="pk_invite"),
        sa.ForeignKeyConstraint(
            ["device_id"],
            ["device.device_id"],
            name="fk_invite_device_id_device",
            ondelete="RESTRICT",
        ),
    )
    op.create_table(
        "nonce",
        sa.Column("principal", sa.String(128), nullable=False),
        sa.Column("nonce", sa.LargeBinary(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("principal", "nonce", name="pk_nonce"),
    )
    op.create_index("ix_nonce_expires_ms", "nonce", ["expires_ms"])
    op.create_table(
        "round_control",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("run_requested_ms", sa.BigInteger(), nullable=True),
        sa.Column("open_round", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_round_control"),
    )


def downgrade() -> None:
    """Back to the registry alone; devices have to enrol anew."""
    for table in ("round_control", "nonce", "invite", "token", "device"):
        op.drop_table(table)

"""What is left of erased users: no name, no bytes; only what keeps them from coming back."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0002"


def upgrade() -> None:
    """New tables, and the registry's own pepper."""
    pepper = op.create_table(
        "pepper",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("pepper", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_pepper"),
    )
    op.bulk_insert(pepper, [{"id": 1, "pepper": secrets.token_bytes(32)}])
    op.create_table(
        "tombstone",
        sa.Column("receipt", sa.String(32), nullable=False),
        sa.Column("user_hmac", sa.LargeBinary(), nullable=False),
        sa.Column("base", sa.String(64), nullable=True),
        sa.Column("erased_ms", sa.BigInteger(), nullable=False),
        sa.Column("versions", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("receipt", name="pk_tombstone"),
    )
    op.create_index("ix_tombstone_user_hmac", "tombstone", ["user_hmac"])
    op.create_table(
        "erased_line",
        sa.Column("line_hmac", sa.LargeBinary(), nullable=False),
        sa.Column("next_version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("line_hmac", name="pk_erased_line"),
    )
    op.create_table(
        "erased_key",
        sa.Column("key_hmac", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("key_hmac", name="pk_erased_key"),
    )


def downgrade() -> None:
    """Whoever was erased may be published again by what was under way, and numbers begin anew."""
    for table in ("erased_key", "erased_line", "tombstone", "pepper"):
        op.drop_table(table)

"""What keeps erased users from coming back, and seals on what never changes."""

import hashlib
import json
import secrets
from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


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
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("line_hmac", name="pk_erased_line"),
    )
    seal = op.create_table(
        "seal",
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_seal"),
    )
    for values in _to_seal():
        text = json.dumps(values).encode()
        op.bulk_insert(seal, [{"sha256": hashlib.sha256(text).digest()}])
    op.create_table(
        "erased_key",
        sa.Column("key_hmac", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("key_hmac", name="pk_erased_key"),
    )


def _to_seal() -> Iterator[list[object]]:
    """Every version, every round with its people, and the server state."""
    run = op.get_bind().exec_driver_sql
    for row in run(
        "SELECT owner_kind, owner_name, base, version, form, digest, schema_digest, round_num, "
        "num_examples, metrics, parent, global_digest, created_ms, idem_key "
        "FROM adapter_version JOIN adapter ON adapter.id = adapter_id"
    ).all():
        yield ["version", *row]
    for row in run("SELECT round_num, version, metrics, committed_ms FROM round").all():
        people = run(
            "SELECT position, client, verdict, reason, num_examples, norm, metrics "
            f"FROM contribution WHERE round_num = {int(row[0])} ORDER BY position"
        ).all()
        yield ["round", *row, [list(person) for person in people]]
    for round_num, state in run("SELECT round_num, state FROM server_state").all():
        yield ["state", round_num, hashlib.sha256(state).hexdigest()]


def downgrade() -> None:
    """Whoever was erased may be published again by what was under way, and numbers begin anew."""
    for table in ("erased_key", "seal", "erased_line", "tombstone", "pepper"):
        op.drop_table(table)

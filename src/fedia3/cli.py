"""The command line: what people type, and what they are told.

Commands import what they need when they run, so that ``--help`` answers at once.
"""

import json
import logging
import os
import shlex
import sys
from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click.core import ParameterSource
from rich.markup import escape

from fedia3 import __version__, cli_upkeep  # noqa: F401  its commands join the registry's
from fedia3.cli_client import client_app
from fedia3.cli_coordinator import coordinator_app
from fedia3.cli_registry import registry_app
from fedia3.console import Json, err, out, print_json
from fedia3.errors import BadSetting, Fedia3Error, NotFound
from fedia3.progress import TerminalProgress

if TYPE_CHECKING:
    from fedia3.client.coordinator import Coordinator, Served
    from fedia3.client.records import AdapterVersion
    from fedia3.simulations.report import Report
    from fedia3.simulations.settings import RunFolder

EXIT_CODES = """
Exit codes: 0 done · 1 a fault of fedia3 · 2 the command was mistyped · 3 bad input (data,
adapter, option) · 4 not found · 5 conflict · 6 stored bytes are corrupt · 7 no gradient ·
8 too few usable replies for a round · 9 the disk refused · 10 not allowed · 11 the coordinator
does not answer.
"""
ANSWER_S = 10.0  # a coordinator that starts anew is back by then
app = typer.Typer(
    name="fedia3",
    help="Federated on-device personalization: everyone gets their own language model, nobody's "
    "text leaves their device.\n\n"
    "[bold]fedia3 simulate[/bold] trains a small federation on this machine and tells what to "
    "type next.\n\n"
    "[bold]fedia3 coordinator init[/bold] begins one of real devices, each of which learns with "
    "[bold]fedia3 client run[/bold].",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
base_app = typer.Typer(
    help="The 4-bit base models on this machine.", no_args_is_help=True, rich_markup_mode="rich"
)
app.add_typer(base_app, name="base")
app.add_typer(coordinator_app, name="coordinator")
app.add_typer(client_app, name="client")
app.add_typer(registry_app, name="registry")

RunOption = Annotated[
    Path | None,
    typer.Option("--run", help="Run folder.", show_default="the newest in ./fedia3-runs"),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", help="Which federation, where a run has several seeds.",
                 show_default="the first"),
]  # fmt: skip
UserOption = Annotated[str, typer.Option("--user", "-u", help="Whose adapter.")]
Alpha = Annotated[
    str,
    typer.Option(
        help="How personal: 0 is the global adapter, 1 the user's own. By kind: k=1,v=0.5,ff=0; "
        "by layer: layer:0-3=1,layer:4-7=0.2."
    ),
]


class SplitBy(StrEnum):
    """How each user's texts are split; see ``fedia3.client.splits``."""

    order = "order"
    seed = "seed"
    item = "item"


def main() -> None:
    """Run the command line; errors made on purpose become one line and an exit code."""
    _set_up_libraries()
    try:
        app()
    except Fedia3Error as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
def simulate(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file or folder: rows with a user column and text; messages; prompt and "
            "completion; instruction, input and output; or text and label.",
            show_default="24 embedded demo users, synthetic",
        ),
    ] = None,
    user_field: Annotated[str, typer.Option(help="The column that says whose row it is.")] = "user",
    order_field: Annotated[
        str | None,
        typer.Option(help="The column that orders a user's rows.", show_default="file order"),
    ] = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Count malformed lines instead of stopping.")
    ] = False,
    base: Annotated[
        str, typer.Option(help="Base model: name, digest or folder; see `fedia3 base list`.")
    ] = "tiny",
    rounds: Annotated[int, typer.Option(help="Federated rounds.")] = 5,
    cohort: Annotated[int, typer.Option(help="Clients in a round.")] = 8,
    epochs: Annotated[int, typer.Option(help="Passes over a client's text in a round.")] = 1,
    max_steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps of a client in a round, at most.",
                     show_default="as many as the epochs take"),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Of a client in a round.")] = 3e-2,
    personal_epochs: Annotated[
        int, typer.Option(help="Most passes when personalizing; it stops on a plateau.")
    ] = 6,
    personal_learning_rate: Annotated[float, typer.Option(help="When personalizing.")] = 3e-2,
    batch_size: Annotated[int, typer.Option(help="Texts in an optimizer step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of one text; longer ones are cut.")] = 128,
    min_examples: Annotated[
        int, typer.Option(help="Users with fewer texts are not trained, but named.")
    ] = 10,
    max_examples: Annotated[
        int | None, typer.Option(help="The newest so many of each user.", show_default="all")
    ] = None,
    split: Annotated[
        SplitBy,
        typer.Option(help="Train on the oldest and test on the newest (order), by lot (seed), or "
                     "the same item on the same side for everybody (item)."),
    ] = SplitBy.order,
    seeds: Annotated[
        int, typer.Option(help="How many federations to train, one for each seed from 0.")
    ] = 1,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", help="Run folder.", show_default="./fedia3-runs/DATE"),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue an interrupted run at its last round; its own settings hold."),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train a federation on this machine and report what it did for each user.

    Rounds of federated training, then every user's own adapter, then a test on
    text nobody trained on: the base model, the global adapter, the user's own
    and, as the control, another user's.

    [bold]fedia3 simulate[/bold]                                      the embedded demo users
    [bold]fedia3 simulate --data chats.jsonl --user-field author[/bold]  your own text
    [bold]fedia3 simulate --resume fedia3-runs/…[/bold]                  after an interruption
    """
    from fedia3.adapters.update import TrainingPlan  # noqa: PLC0415  # --help stays fast
    from fedia3.client.splits import SplitPlan  # noqa: PLC0415  # as above
    from fedia3.simulations.settings import RunFolder, Settings  # noqa: PLC0415  # as above

    watcher = TerminalProgress(quiet=as_json)
    if resume is not None:
        _require_nothing_beside_resume(context)
        folder = RunFolder(resume)
        settings = folder.settings()
    else:
        shared: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
        settings = Settings(
            data=str(data.resolve()) if data else None,
            user_field=user_field,
            order_field=order_field,
            skip_bad_lines=skip_bad_lines,
            base=_whole_path(base),
            rounds=rounds,
            cohort=cohort,
            seeds=tuple(range(seeds)),
            split=SplitPlan(by=split.value, min_examples=min_examples, max_examples=max_examples),
            training=TrainingPlan(
                learning_rate=learning_rate, epochs=epochs, max_steps=max_steps, **shared
            ),
            personal=TrainingPlan(
                learning_rate=personal_learning_rate,
                epochs=personal_epochs,
                patience=2,
                **shared,
            ),
        )
        folder = RunFolder.new(out_folder)
    with watcher.working("loading the base model"):
        from fedia3.simulations.simulation import simulate as run  # noqa: PLC0415  # torch
    with watcher:
        report = run(settings, folder, watcher)
    if as_json:
        print(json.dumps({"folder": str(folder.path)} | json.loads(report.to_json()), indent=1))
    else:
        _tell(report, folder, is_latest=out_folder is None and resume is None)


@app.command()
def fetch(
    user: UserOption,
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    alpha: Alpha = "1",
    everyones: Annotated[
        str, typer.Option("--global", help="On which of everyone's adapters: an alias or number.")
    ] = "latest",
    run: RunOption = None,
    seed: SeedOption = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Folder of an enrolled device: fetch from its coordinator.",
                     show_default="this machine's, if it is enrolled and no run is named"),
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT to fetch from, with a service's token.")
    ] = None,
    ca: Annotated[Path, typer.Option(help="ca.pem of that coordinator.")] = Path("ca.pem"),
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token for that coordinator.")
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a user's adapter as a Hugging Face PEFT folder.

    [bold]fedia3 fetch --user alice --out ./alice[/bold]  asks the coordinator where this
    machine is an enrolled device, else takes the newest run of
    [bold]fedia3 simulate[/bold]. Without the coordinator the last good one is written.

    PEFT's [bold]PeftModel.from_pretrained(base, folder)[/bold] loads it.
    """
    from fedia3.adapters.dial import parse_alpha  # noqa: PLC0415  # --help stays fast

    dial = parse_alpha(alpha)
    source = _source(run, seed, state, coordinator, ca, token_file)
    which = int(everyones) if everyones.isdecimal() else everyones
    if source is not None:
        with source:
            remote = source.save(out_folder, user, dial, which)
            _tell_remote(remote, user, out_folder, as_json)
        return
    from fedia3.simulations.run import Run  # noqa: PLC0415  # --help stays fast

    served = Run.open(run, seed).save(user, out_folder, dial, which)
    facts = {
        "user": user,
        "folder": str(out_folder),
        "choice": "personal" if served.personal else "global",
        "global": _record_facts(served.everyone),
        "personal": _record_facts(served.personal) if served.personal else None,
    }
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    if served.personal:
        out.print(f"{escape(str(served.personal))} on global version {served.everyone.version}")
    else:
        out.print(
            f"{escape(user)} is served global version {served.everyone.version}: no personal "
            "adapter beat it on their own validation text"
        )
    out.print(f"written to {out_folder} (adapter_config.json, adapter_model.safetensors)")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="How the text begins.")],
    user: UserOption,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    sample: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    alpha: Alpha = "1",
    run: RunOption = None,
    seed: SeedOption = None,
    as_json: Json = False,
) -> None:
    """Continue a text in a user's manner."""
    from fedia3.adapters.dial import parse_alpha  # noqa: PLC0415  # --help stays fast

    dial = parse_alpha(alpha)
    from fedia3.client.generation import Sampling  # noqa: PLC0415  # torch: seconds
    from fedia3.simulations.run import Run  # noqa: PLC0415  # as above

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=sample)
    text = Run.open(run, seed).generate(user, prompt, sampling, dial)
    if as_json:
        print(json.dumps({"user": user, "prompt": prompt, "completion": text}))
    else:
        out.print(f"[bold]{escape(prompt)}[/]{escape(text)}", soft_wrap=True)


@app.command()
def adapters(run: RunOption = None, seed: SeedOption = None, as_json: Json = False) -> None:
    """List every version a run's registry holds: everyone's, then each user's."""
    from fedia3.simulations.run import Run  # noqa: PLC0415  # --help stays fast

    opened = Run.open(run, seed)
    versions = opened.versions()
    if as_json:
        print(json.dumps([_record_facts(record) for record in versions], indent=1))
        return
    for record in versions:
        out.print(
            f"{escape(str(record.owner)):<28} v{record.version:<3} round {record.round_num:<3} "
            f"{record.num_examples:>6} texts  {record.digest[:12]}"
        )
    own = {record.owner.name for record in versions if record.owner.kind == "user"}
    served_global = [user for user in opened.users() if user not in own]
    if served_global:
        out.print(f"served the global adapter: {escape(', '.join(served_global))}")


@base_app.command("import")
def base_import(
    source: Annotated[str, typer.Argument(help="Folder of a transformers model, or a hub id.")],
    name: Annotated[
        str | None, typer.Option(help="What to call it.", show_default="the folder's name")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Module to scale, for an architecture fedia3 does not know; repeat it."),
    ] = None,
    feedforward: Annotated[
        list[str] | None,
        typer.Option(help="Those of the targets that are scaled on their input; repeat it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize a model to 4 bits (NF4, double quantization) and keep it."""
    from fedia3.adapters.base_store import BaseStore  # noqa: PLC0415  # --help stays fast

    with TerminalProgress(quiet=as_json).working(f"quantizing {source}"):
        entry = BaseStore().import_base(
            source, name or Path(source).name, targets=target, feedforward=feedforward
        )
    if as_json:
        print(json.dumps(asdict(entry), default=str, indent=1))
    else:
        out.print(
            f"{entry.name} {entry.digest[:12]}  {entry.size / 1e6:.1f} MB  "
            f"{entry.n_params:,} scales\nuse it with `fedia3 simulate --base {entry.name}`"
        )


@base_app.command("list")
def base_list(as_json: Json = False) -> None:
    """List the base models on this machine, the shipped ones included."""
    from fedia3.adapters.base_store import BaseStore  # noqa: PLC0415  # --help stays fast

    entries = BaseStore().list()
    if as_json:
        print(json.dumps([asdict(entry) for entry in entries], default=str, indent=1))
        return
    for entry in entries:
        shipped = "  shipped" if entry.shipped else ""
        out.print(
            f"{escape(entry.name):<20} {entry.digest[:12]}  {entry.size / 1e6:8.1f} MB  "
            f"{entry.architecture}  {entry.n_params:,} scales{shipped}"
        )


def _require_nothing_beside_resume(context: typer.Context) -> None:
    """A resumed run has its own settings: say so instead of passing over others."""
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name not in ("resume", "as_json", None)
        and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise BadSetting(
            f"--resume continues a run with the settings it was started with; leave out "
            f"{', '.join(given)}, or start a new run"
        )


def _tell(report: "Report", folder: "RunFolder", *, is_latest: bool) -> None:
    """The report's head, and what to type next."""
    parts = report.to_text().split("\n\n")
    out.print()
    out.print(escape("\n\n".join(parts[:-1])), soft_wrap=True)
    users = [u.user for u in report.users if u.choice == "personal"] or [report.users[0].user]
    user = shlex.quote(users[0])
    run = "" if is_latest else f" --run {shlex.quote(str(folder.path))}"
    out.print(f"\nevery user: {escape(str(folder.path / 'report.txt'))}, .json and .png\nnext:")
    out.print(escape(f'  fedia3 generate --user {user}{run} "hi"'), soft_wrap=True)
    out.print(
        escape(f"  fedia3 fetch --user {user}{run} --out ./{_file_name(users[0])}"), soft_wrap=True
    )


def _source(
    run: Path | None,
    seed: int | None,
    state: Path | None,
    coordinator: str | None,
    ca: Path,
    token_file: Path | None,
) -> "Coordinator | None":
    """The coordinator that was meant, or None for a run of the simulation."""
    from fedia3.client.device import DeviceFolder  # noqa: PLC0415  # --help stays fast

    named = [name for name, value in (("--run", run), ("--state", state),
                                      ("--coordinator", coordinator)) if value]  # fmt: skip
    if len(named) > 1:
        raise BadSetting(f"an adapter comes from one place, got {' and '.join(named)}")
    is_run = run is not None or seed is not None
    if coordinator is None and (is_run or not (state or DeviceFolder().is_enrolled)):
        return None
    from fedia3.client.coordinator import Coordinator  # noqa: PLC0415  # as above

    if coordinator is None:
        return Coordinator.from_state(state, timeout_s=ANSWER_S)
    if token_file is None:
        raise BadSetting(
            "--coordinator takes a service's token in --token-file; the operator makes one with "
            "`fedia3 coordinator token`"
        )
    token = _read(token_file, "--token-file").decode().strip()
    return Coordinator(coordinator, ca=_read(ca, "--ca"), token=token, timeout_s=ANSWER_S)


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFound(f"cannot read {path} ({error.strerror}); name it with {option}") from error


def _tell_remote(served: "Served", user: str, folder: Path, as_json: bool) -> None:
    if as_json:
        print_json({
            "user": user,
            "folder": str(folder),
            "choice": served.choice,
            "global": _version_facts(served.everyone),
            "personal": _version_facts(served.personal),
            "unshared": asdict(served.unshared) if served.unshared else None,
            "fallback": served.fallback,
        })  # fmt: skip
        return
    everyone = f"global version {served.everyone.version}" if served.everyone else "the base model"
    if served.personal:
        out.print(f"{escape(str(served.personal))} on {everyone}")
    elif served.unshared:
        out.print(f"{escape(user)}'s own part, only on this device, on {everyone}")
    else:
        out.print(f"{escape(user)} is served {everyone}: there is no own part that is better")
    if served.fallback:
        err.print(f"[bold yellow]the last good one:[/] {escape(served.fallback)}", soft_wrap=True)
    out.print(f"written to {folder} (adapter_config.json, adapter_model.safetensors)")


def _version_facts(version: "AdapterVersion | None") -> dict[str, Any] | None:
    return None if version is None else {"owner": version.user or "everyone"} | asdict(version)


def _set_up_libraries() -> None:
    """What they read when they are imported; they need not say what only their authors can mend."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it prints every handshake that fails
    # its fork handlers run before a child's program does, and may end it (signal 6 or 11)
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    logging.getLogger("fedia3").addHandler(logging.NullHandler())  # commands say it themselves


def _record_facts(record: Any) -> dict[str, Any]:
    facts = asdict(record)
    facts["owner"] = str(record.owner)
    return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in facts.items()}


def _whole_path(base: str) -> str:
    """A base model's folder as it is called from anywhere; names and digests as they are."""
    return str(Path(base).resolve()) if os.sep in base else base


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)

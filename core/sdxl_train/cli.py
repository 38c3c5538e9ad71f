"""The command line. Everything heavy is imported inside the commands, so that `--help` and configuration errors are instant."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from sdxl_train.errors import PluginError, SdxlTrainError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tunes SDXL checkpoints. `sdxl-train FILE.toml` trains; it is short for `sdxl-train train FILE.toml`.",
)
plugins_app = typer.Typer(help="Lists the installed plugins.", rich_markup_mode=None)
app.add_typer(plugins_app, name="plugins")

File = Annotated[Path, typer.Argument(metavar="FILE.toml", help="The configuration.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key of the file; repeatable, dotted for tables.")
]


@app.command()
def train(file: File, settings: Settings = None) -> None:
    """Train as the file says."""
    from sdxl_train.config import load_settings

    checked = load_settings(file, settings or ())
    from sdxl_train.training import run_training

    run_training(checked)


@app.command()
def cache(file: File, settings: Settings = None) -> None:
    """Build the latent caches only."""
    from sdxl_train.config import load_settings

    checked = load_settings(file, settings or (), needs=("data", "cache"))
    from sdxl_train.cache_command import run_cache

    run_cache(checked)


@app.command()
def check(
    file: File,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture too: finds damage that headers do not show.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Measure the memory of a step too, without a GPU: half a minute.")] = False,
) -> None:
    """Report the plan of a training and every problem, without loading a model."""
    from sdxl_train.check import run_check

    sys.exit(run_check(file, settings or (), as_json, decode, memory))


@app.command()
def preview(
    file: File,
    settings: Settings = None,
    epoch: Annotated[int, typer.Option(help="The epoch to show, counted from 1.", min=1)] = 1,
    num: Annotated[int, typer.Option(help="How many samples, in the order of the training.", min=1)] = 64,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the contact sheets are written.")] = Path("preview"),
) -> None:
    """Show what training will draw: captions, flips, crops and timesteps, as a table and as contact sheets."""
    from sdxl_train.config import load_settings

    checked = load_settings(file, settings or (), needs=("data",))
    from sdxl_train.preview import run_preview

    run_preview(checked, epoch, num, out)


@app.command()
def sample(
    file: File,
    settings: Settings = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A saved model, or a diffusers directory, in place of the file's base model.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the pictures are written; else <output_dir>/samples/eval_<time>.")
    ] = None,
) -> None:
    """Render the sample benchmark with a model, without training. Needs no data set."""
    from sdxl_train.config import load_settings
    from sdxl_train.toml_text import toml_value

    chosen = [] if model is None else [f"pretrained_model_name_or_path={toml_value(model)}"]
    checked = load_settings(file, [*(settings or ()), *chosen], needs=("samples",))
    from sdxl_train.sample_command import run_sample

    run_sample(checked, out)


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the demo is written.")] = Path("sdxl-train-demo"),
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="Write the files and stop before training.")] = False,
) -> None:
    """Write a tiny SDXL, pictures and a configuration, then train on them."""
    from sdxl_train.demo import run_demo

    run_demo(directory, prepare_only)


@app.command()
def ctl(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The project folder of the training: what it printed as output_dir.")],
    request: Annotated[str, typer.Argument(metavar="save|sample|stop", help="What it is to do at the end of its present step.")],
) -> None:
    """Ask a running training to save, to render its samples, or to end as after its last step."""
    from sdxl_train.control import send_request

    send_request(directory, request)


@app.command()
def example() -> None:
    """Print a configuration with every key, its default and a comment."""
    from sdxl_train.reference import example_toml

    print(example_toml(), end="")


@app.command()
def schema() -> None:
    """Print a JSON schema of the configuration with the installed plugins, for editors."""
    import json

    from sdxl_train.reference import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@plugins_app.callback(invoke_without_command=True)
def list_plugins(context: typer.Context) -> None:
    """List the installed plugins by the key that selects them."""
    if context.invoked_subcommand is None:
        from sdxl_train.plugin_listing import list_plugins

        print(list_plugins(), end="")


@plugins_app.command()
def info(key: Annotated[str, typer.Argument(metavar="KEY")], name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Show what a plugin does and its options."""
    from sdxl_train.plugin_listing import plugin_info

    print(plugin_info(key, name), end="")


def main() -> None:
    """The console script. Exit codes: 0 done; 2 found wrong before step 1; 1 another failure; 130, 143, 129 stopped by a signal."""
    arguments = sys.argv[1:]
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands} | {"plugins"}
    if arguments and arguments[0] not in commands and arguments[0] not in ("--help", "-h"):
        arguments = ["train", *arguments]
    try:
        app(args=arguments, prog_name="sdxl-train")
    except PluginError:  # from a running hook; what cannot be loaded is a ConfigError
        traceback.print_exc()
        sys.exit(1)
    except SdxlTrainError as error:
        _fail(str(error))


def _fail(message: str) -> None:
    from sdxl_train.text_display import printable

    print(f"sdxl-train: {printable(message)}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    main()

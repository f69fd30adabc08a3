"""`python -m ntjax.train`: runs the stages of a config."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from ntjax import errors
from ntjax.compiling import keep_compiled, set_defaults


def main(argv: Sequence[str]) -> None:
    """Parses the command line and runs the config."""
    parser = argparse.ArgumentParser("ntjax train", description="Runs the stages of a config, in order.")
    parser.add_argument(
        "--config", required=True, help="TOML, YAML or JSON file, or a .py file with get_config()"
    )
    parser.add_argument(
        "--resume", metavar="DIR|auto", help="go on with a run, a stage or a checkpoint-N folder"
    )
    parser.add_argument("--output-dir", help="instead of base_output_dir")
    parser.add_argument("--stages", default="", help="only these, by name or type, comma-separated")
    parser.add_argument(
        "--deepspeed", metavar="FILE", help="a DeepSpeed JSON, read for what has a counterpart"
    )
    parser.add_argument(
        "--allow-changed", action="store_true", help="resume although settings or data differ"
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 of a run of several processes listens"
    )
    parser.add_argument("--num-processes", type=int, metavar="N", help="how many processes the run has")
    parser.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any setting, by dotted path")
    args = parser.parse_intermixed_args(argv)
    place = args.coordinator, args.num_processes, args.process_id
    overrides = [*args.overrides]
    if args.output_dir:
        overrides.append(f"base_output_dir={args.output_dir}")
    if args.deepspeed:
        overrides.append(f"deepspeed={args.deepspeed}")

    from ntjax.config import load_config

    config = load_config(args.config, overrides)
    if config.model.device != "auto":
        os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(config.model.device, config.model.device)
    set_defaults()

    from dataclasses import asdict

    from ntjax import hosts
    from ntjax.pipeline import run
    from ntjax.runs import begun_since

    keep_compiled(config.compile_cache)
    hosts.join(hosts.named_place(*place), asdict(config.timeouts))
    # `ntjax.launch` starts a command again as it was given: what was begun goes on.
    since = float(os.environ.get("NTJAX_SINCE", 0))
    again = os.environ.get("NTJAX_RESUME") if begun_since(config, since) else None
    resume = again or args.resume or config.resume_from_checkpoint
    stages = [name.strip() for name in args.stages.split(",") if name.strip()]
    run(config, resume=resume, stages=stages, allow_changed=args.allow_changed)
    hosts.part()


if __name__ == "__main__":
    errors.run(main)

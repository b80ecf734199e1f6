"""The command line that all jobs share: `python -m jobs.VERB_NOUN --config FILE [section.key=value ...]`."""

from __future__ import annotations

import argparse
import errno

from cbtm_ray import files, progress
from cbtm_ray.errors import UserError, refuse
from cbtm_ray.inputs import check_inputs
from cbtm_ray.load_config import dump_config, load_config
from cbtm_ray.memory import out_of_memory
from cbtm_ray.ray_session import ray_session
from cbtm_ray.run import Run, Unfinished, no_space_left


def main(description: str, job: str, arguments: list[str] | None = None) -> int:
    """Parse the command line, run the job on Ray, and return its exit code: 0, or 2 with one line for a user's mistake."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, such as configs/quickstart.yaml")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--check", action="store_true", help="check the configuration and what it names, and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields to set over the file's")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if options.print_config:
            print(dump_config(config), end="")
            return 0
        run = Run(config)
        if options.check:
            run.check()
            check_inputs(run)
            progress.note("The configuration and all that it names are in order. Nothing was started.")
            return 0
        run.open()
        check_inputs(run)
        with ray_session():
            # Imported only now: it takes seconds, which a mistyped key need not wait for.
            from cbtm_ray import pipeline, sweep

            whole = {"run_all": pipeline.run_all, "sweep_clusters": sweep.sweep_clusters}
            whole[job](run) if job in whole else pipeline.run_job(run, job)
    except Unfinished as part:
        progress.note(str(part))
    except UserError as error:
        return refuse(str(_cause(error)))
    except OSError as error:
        cause = _cause(error)
        if getattr(cause, "errno", None) == errno.ENOSPC:
            return refuse(no_space_left(config.run.dir))
        if (said := files.refusal(cause)) is None:
            raise
        return refuse(f"{said} What is finished is kept, and the same command continues.")
    except Exception as error:
        if (killed := out_of_memory(error)) is None:
            raise
        return refuse(killed)
    except KeyboardInterrupt:
        progress.console.print("Interrupted. The same command continues.")
        return 130
    return 0


def _cause(error: BaseException) -> BaseException:
    """The exception that a Ray worker raised, without the remote traceback that Ray prints before it."""
    while (cause := getattr(error, "cause", None)) is not None:
        error = cause
    return error

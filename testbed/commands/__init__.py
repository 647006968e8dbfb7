"""The subcommands of `python -m testbed`: each module has a `main(arguments) -> exit code`."""

"""One dataclass and one ``run(config)`` a verb of the command line."""

"""How candidates get evaluated and how nothing gets lost: executors, the evaluation log, the run's state, the board."""

"""What a stage will need of a machine, found by compiling its programs on shapes alone: nothing is run."""

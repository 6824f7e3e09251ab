"""What all experiments are run by: settings, tasks, networks, runs, results, pictures, the command line."""

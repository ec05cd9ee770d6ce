"""What starts the processes of a job. ``warm`` forks them from a parent that has imported the stack already."""

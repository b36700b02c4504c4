"""Fine-tuning and scoring on GLUE: tasks, jobs, sweeps, reports."""

"""A study on its way: what is asked of Optuna, what Ray Tune runs, what came back, what is left."""

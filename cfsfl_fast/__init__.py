"""CF-SFL, collaborative filtering with a synthetic feedback loop, made fast."""

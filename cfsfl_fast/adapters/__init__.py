"""CF-SFL as a model of `rectools`, `recbole` and `lenskit`: a file each, which needs its library."""

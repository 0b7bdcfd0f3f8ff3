"""The checker of annotations at run time, which pyproject.toml names: an int may be passed for a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))

"""Lets the server of the ranks import what the examples import, which takes longer than most of their trainings."""

from tests.support.ranks import IMPORTED_ONCE

IMPORTED_ONCE += ["transformers.trainer", "transformers.models.gpt_neox.modeling_gpt_neox", "accelerate"]

"""Evaluation: the candidate against the well-prompted base, on rows that training never saw.

Arms say what is compared, generation makes the outputs in a child process, scorers judge each
output by the dataset's contract, and the verdict, by `appliance.statistics`, says
ship, hold, inconclusive or reject. It never passes by missing data.
"""

from __future__ import annotations

from appliance.evaluation.arms import Arm, Prompt, build_arms, build_prompts
from appliance.evaluation.generate import GenerationJob, generate
from appliance.evaluation.outputs import Output, Result, decode_outputs, decode_results, encode_results
from appliance.evaluation.rehearsal import rehearse_prompts
from appliance.evaluation.scorers import score_outputs
from appliance.evaluation.verdict import Verdict, judge

__all__ = [
    "Arm",
    "GenerationJob",
    "Output",
    "Prompt",
    "Result",
    "Verdict",
    "build_arms",
    "build_prompts",
    "decode_outputs",
    "decode_results",
    "encode_results",
    "generate",
    "judge",
    "rehearse_prompts",
    "score_outputs",
]

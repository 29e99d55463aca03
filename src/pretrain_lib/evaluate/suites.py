"""The lm-eval tasks on which the model of each recipe is evaluated."""

SUITES = {
    "gpt2_124m": ("hellaswag", "lambada_openai", "piqa", "arc_easy", "winogrande", "wikitext"),
}
SUITES["llama_1_3b"] = (*SUITES["gpt2_124m"], "arc_challenge", "openbookqa", "boolq", "sciq")

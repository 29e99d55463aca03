"""The tasks of lm-eval by which each recipe's model is judged."""

SUITES = {
    "gpt2_124m": ("hellaswag", "lambada_openai", "piqa", "arc_easy", "winogrande", "wikitext"),
}
SUITES["llama_1_3b"] = (*SUITES["gpt2_124m"], "arc_challenge", "openbookqa", "boolq", "sciq")

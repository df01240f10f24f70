"""vLLM serves pruned models: a plug-in at its registry of quantization methods (`vllm.general_plugins`).

| file | what |
|---|---|
| `plugin` | registers the method `pp_fx` in each of vLLM's processes |
| `method` | vLLM's configuration of it: which linear layers belong to which MLP |
| `refusals` | what cannot be served, named while the model loads |
| `quantized` | weights that are quantized already: vLLM's method for them inside of ours, its product for W8A8 |
| `linears` | what vLLM calls in place of the two linear layers of an MLP |
| `mlp` | an MLP with its weights, its state and its selection |
| `steps` | what the present step prunes (`pp_fx.runtime.engine_step`), and how often that was |
| `operators` | the same calls as operators, which compiled models leave whole |

vLLM is imported nowhere else, and nothing else imports these modules.
"""

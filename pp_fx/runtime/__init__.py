"""What rewritten graphs call, in the order of a call (paper, section 3).

| file | what |
|---|---|
| `plan` | what this call does: select, reuse, re-probe, or run dense |
| `real_rows` | which rows hold a token |
| `probe` | which rows of the residual run ahead, and their run through the branch |
| `head_gram` | how the heads of the probe meet in the output |
| `select` | score of every unit, top-k: the selection |
| `gather` | the linear layers over the kept rows and columns |
| `model_calls` | the model's own attention, KV cache and modules |
| `compensate` | what stands in for the dropped units |
| `history` | the running statistics, updated from what ran |
| `rolling` | an engine's one selection for tokens that decode |
| `split` | an engine's step: its prompt tokens apart from its other tokens |

They stand on `state` (what a group remembers), `selections` and `compact` (what a generation keeps on its KV cache),
`buffers` and `cuda_graphs` (memory that outlives a call), `modes` (states for a while) and `names`. `engine_step` says
what a step of an engine with continuous batching prunes.
"""

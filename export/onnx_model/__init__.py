"""ONNX export: graphs by the model builder or torch, weights that stay packed, validation.

The graph is made by others: onnxruntime-genai's model builder, or `torch.onnx.export`. Ours is what
they lack: the operator `ai.gblm::Linear`, whose weights stay packed, and a report that holds the
exported model against the original one.
"""

"""ONNX export: graphs by the model builder, weights that stay packed, validation.

The graph is made by onnxruntime-genai's model builder, and onnxruntime-genai runs it. Ours is what
they lack: the operator `ai.gblm::Linear`, whose weights stay packed, and a report that holds the
exported model against the original one.
"""

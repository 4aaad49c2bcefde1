"""Models are exported for ONNX Runtime here, with weights that stay packed, and validated.

The graph is made by onnxruntime-genai's model builder, and onnxruntime-genai runs it. Ours is what
they lack: the operator `ai.gblm::Linear`, whose weights stay packed, and a report that holds the
exported model against the original one.
"""

from triton_server_model.tensorrt_llm import TritonPythonModel

__all__ = ["TritonPythonModel"]

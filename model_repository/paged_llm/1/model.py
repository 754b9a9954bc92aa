from triton_server_model.model import TritonPythonModel

__all__ = ["TritonPythonModel"]

// star_kernels._cuda: importing it registers the CUDA kernels (see the *.cu files); it can tell for which GPUs it was built.
#include <Python.h>
#include <cuda_runtime_api.h>

#include "signatures.h"

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
  PyModule_AddStringConstant(module, "ARCHITECTURES", STAR_CUDA_ARCHITECTURES);
  PyModule_AddIntConstant(module, "TOOLKIT", CUDART_VERSION);
  PyObject* signatures = PyDict_New();
  for (const auto& [name, text] : star::signatures()) {
    PyObject* value = PyUnicode_FromString(text.c_str());
    PyDict_SetItemString(signatures, name.c_str(), value);
    Py_DECREF(value);
  }
  PyModule_AddObject(module, "SIGNATURES", signatures);
  return module;
}

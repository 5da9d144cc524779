// star_kernels._C: loading it registers the compiled operators (see the *_op.cpp files); it can tell how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/isa.h"
#include "signatures.h"

PYBIND11_MODULE(_C, module) {
  module.attr("SIGNATURES") = star::signatures();
  module.def("build_info", [] {
    const char* names[] = {"baseline", "avx2", "avx512"};
    std::string compiled = "baseline";
#ifdef STAR_HAS_AVX2
    compiled += " avx2";
#endif
#ifdef STAR_HAS_AVX512
    compiled += " avx512";
#endif
    std::string sanitizers = "none";
#ifdef __SANITIZE_ADDRESS__
    sanitizers = "address undefined";
#endif
    return std::map<std::string, std::string>{
        {"compiler", __VERSION__},
        {"instruction_sets", compiled},
        {"instruction_set_in_use", names[int(star::isa())]},
        {"sanitizers", sanitizers},
    };
  });
}

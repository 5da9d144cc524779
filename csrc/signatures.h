// What each compiled operator takes and gives, so that Python can tell a module that was compiled from other sources: its
// kernels would fail in their first call.
#pragma once
#include <map>
#include <string>

namespace star {

// Types as torch.library prints those of a schema, by the operator's name.
inline std::map<std::string, std::string>& signatures() {
  static std::map<std::string, std::string> all;
  return all;
}

}  // namespace star

// Where the __shared__ variables of a kernel lie, by the symbols of the program that holds it: the
// compiler does not put those of templates into the section that it was told to.
#include <dlfcn.h>
#include <elf.h>

#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "block.h"

namespace cuda_emulation {
namespace {

struct Variable {
  std::uint64_t address;
  std::size_t bytes;
};

// The functions and the variables that can be written, of one program.
class Symbols {
 public:
  explicit Symbols(const char* path) {
    std::ifstream file(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    if (bytes_.size() > sizeof(Elf64_Ehdr)) {
      read_all();
    }
  }

  // Static variables of a function are named after it.
  std::vector<Variable> of_function(std::uint64_t address) const {
    const auto function = functions_.find(address);
    std::vector<Variable> found;
    if (function == functions_.end() || function->second.compare(0, 2, "_Z") != 0) {
      return found;
    }
    const std::string prefix = "_ZZ" + function->second.substr(2) + "E";
    for (auto variable = variables_.lower_bound(prefix);
         variable != variables_.end() && variable->first.compare(0, prefix.size(), prefix) == 0;
         ++variable) {
      found.push_back(variable->second);
    }
    return found;
  }
  bool is_position_independent() const { return is_position_independent_; }

 private:
  template <typename T>
  const T* at(std::size_t offset) const {
    return reinterpret_cast<const T*>(bytes_.data() + offset);
  }

  void read_all() {
    const auto* header = at<Elf64_Ehdr>(0);
    is_position_independent_ = header->e_type == ET_DYN;
    const auto* sections = at<Elf64_Shdr>(header->e_shoff);
    for (unsigned index = 0; index < header->e_shnum; ++index) {
      if (sections[index].sh_type == SHT_SYMTAB) {
        read(sections[index], sections, header->e_shnum);
      }
    }
    bytes_.clear();
  }

  void read(const Elf64_Shdr& table, const Elf64_Shdr* sections, unsigned num_sections) {
    const char* names = at<char>(sections[table.sh_link].sh_offset);
    for (std::size_t offset = 0; offset < table.sh_size; offset += sizeof(Elf64_Sym)) {
      const auto& symbol = *at<Elf64_Sym>(table.sh_offset + offset);
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC) {
        functions_[symbol.st_value] = names + symbol.st_name;
      } else if (symbol.st_shndx < num_sections &&
                 (sections[symbol.st_shndx].sh_flags & SHF_WRITE) != 0) {
        variables_[names + symbol.st_name] = {symbol.st_value, symbol.st_size};
      }
    }
  }

  std::vector<char> bytes_;
  bool is_position_independent_ = false;
  std::map<std::uint64_t, std::string> functions_;
  std::map<std::string, Variable> variables_;
};

std::vector<SharedVariable> find_variables(const void* kernel) {
  static auto* const programs = new std::map<std::string, Symbols>;
  std::vector<SharedVariable> found;
  Dl_info module = {};
  if (dladdr(kernel, &module) == 0) {
    return found;
  }
  const Symbols& symbols = programs->try_emplace(module.dli_fname, module.dli_fname).first->second;
  const std::uint64_t base =
      symbols.is_position_independent() ? reinterpret_cast<std::uint64_t>(module.dli_fbase) : 0;
  for (const Variable& variable :
       symbols.of_function(reinterpret_cast<std::uint64_t>(kernel) - base)) {
    found.push_back({reinterpret_cast<char*>(base + variable.address), variable.bytes});
  }
  return found;
}

}  // namespace

const std::vector<SharedVariable>& shared_variables(const void* kernel) {
  static auto* const known = new std::map<const void*, std::vector<SharedVariable>>;
  const auto found = known->find(kernel);
  return found != known->end() ? found->second
                               : known->emplace(kernel, find_variables(kernel)).first->second;
}

}  // namespace cuda_emulation

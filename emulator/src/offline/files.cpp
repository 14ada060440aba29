#include "offline/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace cann::offline {

MappedFile::MappedFile(const std::string& path) : file_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    struct stat status = {};
    const bool is_file = file_ >= 0 && fstat(file_, &status) == 0 && S_ISREG(status.st_mode);
    size_ = static_cast<size_t>(status.st_size);
    void* pages = is_file && size_ > 0 ? mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file_, 0) : nullptr;
    if (is_file && pages != MAP_FAILED) {
        data_ = static_cast<const char*>(pages);
        return;
    }
    const std::string reason = file_ >= 0 && !is_file ? "it is no file" : std::strerror(errno);
    if (file_ >= 0) close(file_);
    throw std::runtime_error(path + " cannot be read: " + reason);
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) munmap(const_cast<char*>(data_), size_);
    close(file_);
}

char* MappedFile::map(size_t offset, size_t size) const {
    void* pages = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file_, static_cast<off_t>(offset));
    if (pages == MAP_FAILED) throw std::runtime_error(std::string("cannot map the weights: ") + std::strerror(errno));
    return static_cast<char*>(pages);
}

}  // namespace cann::offline

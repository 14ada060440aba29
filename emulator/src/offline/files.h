// Files that are read where they lie.
#pragma once

#include <string>
#include <string_view>

namespace cann::offline {

class MappedFile {
public:
    explicit MappedFile(const std::string& path);  // throws std::runtime_error
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    std::string_view content() const { return {data_, size_}; }
    // Another mapping of a part that begins at a page; it stays when the file is gone.
    char* map(size_t offset, size_t size) const;

private:
    int file_ = -1;
    const char* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace cann::offline

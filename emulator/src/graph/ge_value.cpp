// The value classes of GE's interface: strings, shapes, descriptions of tensors, and tensors.
#include <utility>

#include "graph/ge_api.h"
#include "ops/tensor.h"

namespace ge {

AscendString::AscendString(const char* text) : text_(text ? std::make_shared<std::string>(text) : nullptr) {}
const char* AscendString::GetString() const { return text_ ? text_->c_str() : ""; }
bool AscendString::operator<(const AscendString& other) const {
    return std::string_view(GetString()) < std::string_view(other.GetString());
}
bool AscendString::operator==(const AscendString& other) const {
    return std::string_view(GetString()) == std::string_view(other.GetString());
}

const char* GetFormatName(Format format) {
    static thread_local std::string name;
    name = cann::format_name(format);
    return name.c_str();
}

Shape::Shape(const std::vector<int64_t>& sizes) : sizes_(std::make_shared<std::vector<int64_t>>(sizes)) {}
std::vector<int64_t> Shape::GetDims() const { return sizes_ ? *sizes_ : std::vector<int64_t>(); }

TensorDesc::TensorDesc() : description(std::make_shared<Description>()) {}
Shape TensorDesc::GetShape() const { return Shape(description->sizes); }
Format TensorDesc::GetFormat() const { return description->format; }
DataType TensorDesc::GetDataType() const { return description->dtype; }
Placement TensorDesc::GetPlacement() const { return description->placement; }
void TensorDesc::SetFormat(Format format) { description->format = format; }
void TensorDesc::SetDataType(DataType dtype) { description->dtype = dtype; }
void TensorDesc::SetPlacement(Placement placement) { description->placement = placement; }
void TensorDesc::SetOriginShape(const Shape& shape) { description->origin_sizes = shape.GetDims(); }
void TensorDesc::SetOriginFormat(Format format) { description->origin_format = format; }

Content::~Content() {
    if (data != nullptr && free) free(data);
}

Tensor::Tensor() : content(std::make_shared<Content>()) {}

TensorDesc Tensor::GetTensorDesc() const {
    TensorDesc desc;
    *desc.description = content->description;
    return desc;
}

Status Tensor::SetTensorDesc(const TensorDesc& desc) {
    content->description = *desc.description;
    return SUCCESS;
}

const uint8_t* Tensor::GetData() const { return content->data; }
uint8_t* Tensor::GetData() { return content->data; }

Status Tensor::SetData(uint8_t* data, size_t size, const DeleteFunc& free) {
    if (content->data != nullptr && content->free) content->free(content->data);
    content->data = data;
    content->size = size;
    content->free = free;
    return SUCCESS;
}

Status Tensor::ResetData(uint8_t* data, size_t size, const DeleteFunc& free) { return SetData(data, size, free); }

std::unique_ptr<uint8_t[], Tensor::DeleteFunc> Tensor::ResetData() {
    content->size = 0;
    return {std::exchange(content->data, nullptr), content->free};
}

Status Tensor::SetShapeDimNum(size_t rank) {
    content->description.sizes.resize(rank);
    return SUCCESS;
}
size_t Tensor::GetShapeDimNum() const { return content->description.sizes.size(); }
Status Tensor::SetShapeDim(size_t dim, int64_t size) {
    content->description.sizes.at(dim) = size;
    return SUCCESS;
}
int64_t Tensor::GetShapeDim(size_t dim) const { return content->description.sizes.at(dim); }
Status Tensor::SetOriginShapeDimNum(size_t rank) {
    content->description.origin_sizes.resize(rank);
    return SUCCESS;
}
size_t Tensor::GetOriginShapeDimNum() const { return content->description.origin_sizes.size(); }
Status Tensor::SetOriginShapeDim(size_t dim, int64_t size) {
    content->description.origin_sizes.at(dim) = size;
    return SUCCESS;
}
Status Tensor::SetFormat(const Format& format) {
    content->description.format = format;
    return SUCCESS;
}
Format Tensor::GetFormat() const { return content->description.format; }
Status Tensor::SetDataType(const DataType& dtype) {
    content->description.dtype = dtype;
    return SUCCESS;
}
DataType Tensor::GetDataType() const { return content->description.dtype; }
Status Tensor::SetPlacement(const Placement& placement) {
    content->description.placement = placement;
    return SUCCESS;
}
Placement Tensor::GetPlacement() const { return content->description.placement; }

}  // namespace ge

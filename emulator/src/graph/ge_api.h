// GE's C++ interface as far as torchair links to it. The wheel's headers lack half of these functions, so all are
// declared here: names, parameters and the sizes of the classes are the interface, the members are ours.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "graph/ir.h"

#pragma GCC visibility push(default)
namespace ge {

using Status = uint32_t;
constexpr Status SUCCESS = 0, FAILED = 0xFFFFFFFF;

enum DataType : int;   // numbered as aclDataType
enum Format : int;     // numbered as aclFormat
enum Placement : int { kHost = 0, kDevice = 1 };

class AscendString {
public:
    AscendString(const char* text);
    const char* GetString() const;
    bool operator<(const AscendString& other) const;
    bool operator==(const AscendString& other) const;

private:
    std::shared_ptr<std::string> text_;
};
using Options = std::map<AscendString, AscendString>;

class Shape {
public:
    explicit Shape(const std::vector<int64_t>& sizes);
    std::vector<int64_t> GetDims() const;

private:
    std::shared_ptr<std::vector<int64_t>> sizes_;
};

struct Description {
    std::vector<int64_t> sizes, origin_sizes;  // as stored, and as they look
    Format format = Format(2), origin_format = Format(2);
    DataType dtype = DataType(0);
    Placement placement = kHost;
};

class TensorDesc {
public:
    TensorDesc();
    Shape GetShape() const;
    Format GetFormat() const;
    DataType GetDataType() const;
    Placement GetPlacement() const;
    void SetFormat(Format format);
    void SetDataType(DataType dtype);
    void SetPlacement(Placement placement);
    void SetOriginShape(const Shape& shape);
    void SetOriginFormat(Format format);

    std::shared_ptr<Description> description;
};

struct Content;

// Copies of a tensor share its description and its data.
class Tensor {
public:
    using DeleteFunc = std::function<void(uint8_t*)>;

    Tensor();
    TensorDesc GetTensorDesc() const;
    Status SetTensorDesc(const TensorDesc& desc);
    const uint8_t* GetData() const;
    uint8_t* GetData();
    Status SetData(uint8_t* data, size_t size, const DeleteFunc& free);
    Status ResetData(uint8_t* data, size_t size, const DeleteFunc& free);
    std::unique_ptr<uint8_t[], DeleteFunc> ResetData();
    Status SetShapeDimNum(size_t rank);
    size_t GetShapeDimNum() const;
    Status SetShapeDim(size_t dim, int64_t size);
    int64_t GetShapeDim(size_t dim) const;
    Status SetOriginShapeDimNum(size_t rank);
    size_t GetOriginShapeDimNum() const;
    Status SetOriginShapeDim(size_t dim, int64_t size);
    Status SetFormat(const Format& format);
    Format GetFormat() const;
    Status SetDataType(const DataType& dtype);
    DataType GetDataType() const;
    Status SetPlacement(const Placement& placement);
    Placement GetPlacement() const;

    std::shared_ptr<Content> content;
};

struct Content {
    ~Content();

    Description description;
    uint8_t* data = nullptr;
    size_t size = 0;
    Tensor::DeleteFunc free;
};

class GNode {
public:
    Status GetType(AscendString& type) const;

    std::shared_ptr<std::string> type;
};

class Graph {
public:
    explicit Graph(const char* name);
    Status LoadFromSerializedModelArray(const void* bytes, size_t size);
    Status SaveToFile(const char* path) const;
    Status CopyFrom(const Graph& other);
    std::vector<GNode> GetAllNodes() const;

    std::shared_ptr<const cann::graph::Graph> content;
};

class Operator {
public:
    virtual ~Operator() = default;
    Status UpdateInputDesc(const char* name, const TensorDesc& desc);
    Status GetAllIrAttrNamesAndTypes(Options& names_and_types) const;

    std::shared_ptr<std::string> type;
};

class OperatorFactory {
public:
    static bool IsExistOp(const char* type);
    static Operator CreateOperator(const char* name, const char* type);
};

class CompiledGraphSummary {
public:
    bool IsStatic() const;
    Status GetConstMemorySize(size_t& size) const;
    Status GetFeatureMemorySize(size_t& size) const;
    Status GetFixedFeatureMemorySize(size_t& size) const;
    Status GetFeatureMemoryBaseRefreshable(bool& refreshable) const;
    Status GetOutputShapes(std::vector<Shape>& shapes) const;
    Status GetOutputDtypes(std::vector<DataType>& dtypes) const;

    size_t constant_bytes, feature_bytes;
    std::vector<Shape> shapes;
    std::vector<DataType> dtypes;
};

class Allocator;

class Session {
public:
    explicit Session(const Options& options);
    ~Session();
    Status AddGraph(uint32_t id, const Graph& graph, const Options& options);
    Status RemoveGraph(uint32_t id);
    Status CompileGraph(uint32_t id);
    std::shared_ptr<CompiledGraphSummary> GetCompiledGraphSummary(uint32_t id);
    Status RunGraph(uint32_t id, const std::vector<Tensor>& inputs, std::vector<Tensor>& outputs);
    Status RunGraphWithStreamAsync(uint32_t id, void* stream, const std::vector<Tensor>& inputs,
                                   std::vector<Tensor>& outputs);
    Status SetGraphConstMemoryBase(uint32_t id, const void* memory, size_t size);
    Status UpdateGraphFeatureMemoryBase(uint32_t id, const void* memory, size_t size);
    Status SetGraphFixedFeatureMemoryBase(uint32_t id, const void* memory, size_t size);
    Status UpdateGraphRefreshableFeatureMemoryBase(uint32_t id, const void* memory, size_t size);
    Status RegisterExternalAllocator(const void* stream, std::shared_ptr<Allocator> allocator) const;

private:
    uint64_t id_;  // all that torchair has room for
};

const char* GetFormatName(Format format);
Status GEInitialize(const Options& options);
Status GEFinalize();
AscendString GEGetWarningMsgV2();

}  // namespace ge
#pragma GCC visibility pop

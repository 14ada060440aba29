// The file of an offline model: a header, the description, and the weights at the next page, so that they can be mapped.
#include "offline/om.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <unordered_map>

#include "offline/archive.h"
#include "offline/onnx.h"
#include "runtime/runtime.h"

namespace cann::offline {
namespace {

constexpr std::string_view kMagic = "CANN-EMU", kMagicOfCann = "IMOD";
constexpr uint32_t kEdition = 1;
constexpr size_t kPage = 4096, kAlignment = 64;

struct Header {
    char magic[8];
    uint32_t edition, reserved;
    uint64_t description_size, weights_offset, weights_size, digest;
};

size_t round_up(size_t size, size_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// Finds damage, not forgery. Four lanes, so that it reads as fast as memory.
uint64_t digest_of(std::string_view bytes, uint64_t seed) {
    constexpr uint64_t kPrime = 0x9e3779b97f4a7c15;
    uint64_t lanes[4] = {seed ^ 1, seed ^ 2, seed ^ 3, seed ^ 4};
    const auto mix = [&](uint64_t& lane, const char* from, size_t size) {
        uint64_t word = 0;
        std::memcpy(&word, from, size);
        lane = (lane ^ word) * kPrime;
        lane ^= lane >> 29;
    };
    size_t at = 0;
    for (; at + 32 <= bytes.size(); at += 32) {
        for (size_t i = 0; i < 4; ++i) mix(lanes[i], bytes.data() + at + 8 * i, 8);
    }
    for (; at < bytes.size(); at += 8) mix(lanes[0], bytes.data() + at, std::min<size_t>(8, bytes.size() - at));
    uint64_t digest = bytes.size();
    for (uint64_t lane : lanes) digest = (digest ^ lane) * kPrime;
    return digest ^ digest >> 32;
}

}  // namespace

// Serialization finds these by the namespace of the Archive.
template <class Archive>
void transfer(Archive& archive, graph::Declared& desc) {
    archive(desc.name, desc.fx_name);
}

// Of a node, what steps need: names of its operands and its attributes.
template <class Archive>
void transfer(Archive& archive, graph::Node& node) {
    archive(node.name, node.type, node.input_descs, node.output_descs, node.attributes);
}

template <class Archive>
void transfer(Archive&, at::Tensor&) {
    throw std::runtime_error("an operator with a tensor as attribute cannot be kept in an offline model");
}

template <class Archive>
void transfer(Archive& archive, graph::Value& value) {
    archive(value.place, value.dtype, value.sizes, value.format, value.input, value.output, value.memory, value.offset);
}

template <class Archive>
void transfer(Archive& archive, graph::Statistics& of) {
    archive(of.nodes, of.folded, of.fused, of.removed, of.views);
}

template <class Archive>
void transfer(Archive& archive, graph::Compiled& compiled) {
    auto graph = std::make_shared<graph::Graph>();
    if constexpr (!Archive::kReads) {
        graph->name = compiled.graph->name;
        for (const graph::Step& step : compiled.steps) graph->nodes.push_back(*step.node);
    }
    archive(graph->name, graph->nodes, compiled.values, compiled.outputs, compiled.feature_bytes, compiled.statistics);
    if constexpr (Archive::kReads) compiled.steps.resize(graph->nodes.size());
    for (size_t i = 0; i < compiled.steps.size(); ++i) {
        graph::Step& step = compiled.steps[i];
        std::string operation = Archive::kReads ? "" : step.operation->name;
        archive(operation, step.inputs, step.outputs);
        if constexpr (Archive::kReads) {
            step.node = &graph->nodes[i];
            step.operation = graph::find_operation(operation);
            if (step.operation == nullptr) throw std::runtime_error("the operator " + operation + " is not emulated");
        }
    }
    if constexpr (Archive::kReads) compiled.graph = std::move(graph);
}

template <class Archive>
void transfer(Archive& archive, Port& port) {
    archive(port.name, port.dtype, port.sizes, port.format, port.image);
}

template <class Archive>
void transfer(Archive& archive, Profile& profile) {
    archive(profile.gear, profile.inputs, profile.outputs, profile.compiled);
}

template <class Archive>
void transfer(Archive& archive, OfflineModel& model) {
    archive(model.name, model.soc, model.version, model.precision, model.command_line, model.dynamic, model.inputs,
            model.outputs, model.profiles, model.largest);
}

namespace {

// Gathers the constants of all profiles, equal ones once.
class Weights {
public:
    int64_t add(const at::Tensor& constant) {
        const at::Tensor whole = constant.contiguous();
        const std::string_view bytes(static_cast<const char*>(whole.data_ptr()), whole.nbytes());
        const uint64_t digest = digest_of(bytes, 0);
        for (auto [found, end] = at_.equal_range(digest); found != end; ++found) {
            if (std::string_view(all_).substr(found->second, bytes.size()) == bytes) return found->second;
        }
        all_.resize(round_up(all_.size(), kAlignment));
        const int64_t offset = static_cast<int64_t>(all_.size());
        all_.append(bytes);
        at_.emplace(digest, offset);
        return offset;
    }

    std::string take() { return std::move(all_); }

private:
    std::string all_;
    std::unordered_multimap<uint64_t, int64_t> at_;
};

// Constants that no step reads were folded into others: they are not kept.
void move_constants(graph::Compiled& compiled, Weights& weights) {
    std::vector<bool> needed(compiled.values.size(), false);
    const auto need = [&](int index) {
        if (index >= 0) needed[compiled.values[index].memory] = true;
    };
    for (const graph::Step& step : compiled.steps) std::for_each(step.inputs.begin(), step.inputs.end(), need);
    std::for_each(compiled.outputs.begin(), compiled.outputs.end(), need);
    for (size_t i = 0; i < compiled.values.size(); ++i) {
        graph::Value& value = compiled.values[i];
        if (value.place != graph::Value::Place::kConstant || value.memory != static_cast<int>(i)) continue;
        value.offset = needed[i] ? weights.add(value.known) : -1;
    }
}

}  // namespace

size_t bytes_of(const Ints& sizes, at::ScalarType dtype) {
    return static_cast<size_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
}

size_t OfflineModel::feature_bytes() const {
    size_t most = 0;
    for (const Profile& profile : profiles) most = std::max(most, profile.compiled.feature_bytes);
    return most;
}

size_t OfflineModel::input_bytes(size_t index) const {
    size_t most = 0;
    for (const Profile& profile : profiles) most = std::max(most, bytes_of(profile.inputs[index], inputs[index].dtype));
    return most;
}

size_t OfflineModel::output_bytes(size_t index) const {
    size_t most = 0;
    for (const Profile& profile : profiles) {
        most = std::max(most, bytes_of(profile.outputs[index], outputs[index].dtype));
    }
    return most;
}

std::string serialize(OfflineModel& model) {
    Weights gathered;
    for (Profile& profile : model.profiles) move_constants(profile.compiled, gathered);
    Writer writer;
    writer(model);
    const std::string description = writer.take(), weights = gathered.take();
    Header header{};
    kMagic.copy(header.magic, kMagic.size());
    header.edition = kEdition;
    header.description_size = description.size();
    header.weights_offset = round_up(sizeof header + description.size(), kPage);
    header.weights_size = weights.size();
    header.digest = digest_of(weights, digest_of(description, 0));
    std::string file;
    file.reserve(header.weights_offset + weights.size());
    file.append(reinterpret_cast<const char*>(&header), sizeof header);
    file += description;
    file.resize(header.weights_offset);
    return file += weights;
}

Parts check_parts(std::string_view file) {
    if (file.substr(0, kMagicOfCann.size()) == kMagicOfCann) {
        throw Unreadable("this is an offline model of CANN's own atc; the emulator runs only those of its atc");
    }
    Header header{};
    if (file.size() < sizeof header || file.substr(0, kMagic.size()) != kMagic) {
        throw Unreadable("this is no offline model");
    }
    std::memcpy(&header, file.data(), sizeof header);
    if (header.edition != kEdition) throw Unreadable("another edition of the emulator made it: convert the model again");
    if (header.weights_offset > file.size() || header.weights_size > file.size() - header.weights_offset ||
        header.description_size > header.weights_offset - sizeof header) {
        throw Unreadable("the file is truncated: it has " + std::to_string(file.size()) + " bytes of " +
                         std::to_string(header.weights_offset + header.weights_size));
    }
    const Parts parts{file.substr(sizeof header, header.description_size),
                      file.substr(header.weights_offset, header.weights_size), header.weights_offset};
    if (digest_of(parts.weights, digest_of(parts.description, 0)) != header.digest) {
        throw Unreadable("the file is damaged: its content is not what was written");
    }
    return parts;
}

OfflineModel parse(const Parts& parts) {
    OfflineModel model;
    try {
        Reader reader(parts.description);
        reader(model);
    } catch (const std::exception& error) {
        throw Unreadable(error.what());
    }
    if (model.soc != chip().soc) {
        throw Unreadable("it was converted for " + model.soc + ", and this chip is " + chip().soc +
                         ": convert it with --soc_version=" + chip().soc);
    }
    return model;
}

void place_weights(OfflineModel& model, char* weights) {
    for (Profile& profile : model.profiles) {
        for (graph::Value& value : profile.compiled.values) {
            if (value.place != graph::Value::Place::kConstant || value.offset < 0) continue;
            value.known = at::from_blob(weights + value.offset, value.sizes, value.dtype);
        }
    }
}

void write_whole(const std::string& path, std::string_view content) {
    const std::string partial = path + ".partial-" + std::to_string(getpid());
    const int file = open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    bool written = file >= 0;
    while (written && !content.empty()) {
        const ssize_t count = write(file, content.data(), content.size());
        written = count >= 0;
        if (written) content.remove_prefix(count);
    }
    const int reason = errno;
    if (file >= 0) close(file);
    if (written && rename(partial.c_str(), path.c_str()) == 0) return;
    const int error = written ? errno : reason;
    unlink(partial.c_str());
    throw Refusal("E13004", "Failed to write file " + path + ". Reason: [Error " + std::to_string(error) + "] " +
                  std::strerror(error) + ".");
}

}  // namespace cann::offline

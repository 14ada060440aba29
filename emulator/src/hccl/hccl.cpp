// HCCL's functions: communicators between processes of this machine, and the collectives that torch_npu looks up by
// name. Those that it can do without and that nobody has emulated are left out, so that it sees that they are missing.
#include "third_party/hccl/inc/hccl/hccl.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>

#include "hccl/collectives.h"
#include "ops/operator.h"

namespace cann::hccl {
namespace {

using Shared = std::shared_ptr<Communicator>;

std::mutex guard;
std::map<int, HcclConfigValue> settings;

// Never destroyed: torch_npu destroys its communicators when static objects are gone already.
std::map<HcclComm, Shared>& communicators() {
    static auto* instance = new std::map<HcclComm, Shared>;
    return *instance;
}

Shared find(HcclComm handle) {
    std::lock_guard<std::mutex> lock(guard);
    const auto found = communicators().find(handle);
    return found == communicators().end() ? nullptr : found->second;
}

HcclResult fail_hccl(int code, const std::string& message) {
    return static_cast<HcclResult>(fail(code, "%s", message.c_str()));
}

HcclResult no_communicator() { return fail_hccl(HCCL_E_PTR, "the communicator does not exist, or was destroyed"); }

// ---- communicators ----

constexpr char kMagic[] = "cann_emulator_hccl";

struct RootInfo {
    char magic[sizeof kMagic];
    char id[33];
};
static_assert(sizeof(RootInfo) <= sizeof(HcclRootInfo));

int seconds(const char* variable, int otherwise, int least, int most) {
    const char* text = std::getenv(variable);
    if (text == nullptr || *text == '\0') return otherwise;
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (*end == '\0' && value >= least && value <= most) return static_cast<int>(value);
    throw Failure(HCCL_E_PARA, std::string("EI0001: Value [") + text + "] for environment variable [" + variable +
                                   "] is invalid. Expected: an integer from " + std::to_string(least) + " to " +
                                   std::to_string(most));
}

HcclResult init(uint32_t ranks, const HcclRootInfo* root, uint32_t rank, const HcclCommConfig* config, HcclComm* comm) {
    RootInfo info;
    std::memcpy(&info, root->internal, sizeof info);
    if (std::memcmp(info.magic, kMagic, sizeof kMagic) != 0) return fail_hccl(HCCL_E_PARA, "the root info is damaged");
    if (rank >= ranks) return fail_hccl(HCCL_E_PARA, "rank " + std::to_string(rank) + " of " + std::to_string(ranks));
    try {
        const int connect = seconds("HCCL_CONNECT_TIMEOUT", 120, 120, 7200);
        int execute = seconds("HCCL_EXEC_TIMEOUT", 1836, 0, INT32_MAX);
        std::string name = info.id;
        if (config != nullptr) {
            if (config->hcclExecTimeOut != HCCL_COMM_EXECTIMEOUT_CONFIG_NOT_SET) execute = config->hcclExecTimeOut;
            if (*config->hcclCommName != '\0') name = config->hcclCommName;
        }
        const Member self = {rank, ranks, machine_number(current_device())};
        auto made = std::make_shared<Communicator>(info.id, name, self, Seconds(connect), Seconds(execute));
        std::lock_guard<std::mutex> lock(guard);
        *comm = made.get();
        communicators()[*comm] = made;
        return HCCL_SUCCESS;
    } catch (const Failure& failure) {
        return fail_hccl(failure.code, failure.what());
    }
}

// ---- launches ----

const char* name_of(HcclReduceOp operation) {
    switch (operation) {
        case HCCL_REDUCE_SUM: return "sum";
        case HCCL_REDUCE_PROD: return "prod";
        case HCCL_REDUCE_MAX: return "max";
        case HCCL_REDUCE_MIN: return "min";
        default: return "";
    }
}

// A buffer of a call; nullptr where this rank has none.
struct Buffer {
    const char* name;
    const void* memory;
    uint64_t count;
    bool written = false;
};

Argument tensor_argument(const Buffer& buffer, at::ScalarType dtype) {
    auto tensor = std::make_shared<TensorArgument>();
    const std::vector<int64_t> sizes = {static_cast<int64_t>(buffer.count)};
    *tensor = {dtype, sizes, {1}, 0, ACL_FORMAT_ND, sizes, static_cast<char*>(const_cast<void*>(buffer.memory))};
    Argument argument;
    argument.name = buffer.name;
    argument.written = buffer.written;
    argument.tensors.push_back(tensor);
    return argument;
}

Argument value_argument(const char* name, const std::string& value) {
    Argument argument;
    argument.name = name;
    argument.value = value;
    return argument;
}

Call describe(const Collective& collective, const std::vector<Buffer>& buffers, bool reduces) {
    Call call{collective.name, {}};
    for (const Buffer& buffer : buffers) {
        if (buffer.memory != nullptr) call.arguments.push_back(tensor_argument(buffer, collective.dtype));
    }
    const std::string dtype = dtype_name(collective.dtype);
    call.arguments.push_back(value_argument("dataType", dtype));
    if (reduces) {
        const std::string operation = name_of(static_cast<HcclReduceOp>(collective.signature.reduction));
        call.arguments.push_back(value_argument("op", operation));
        call.arguments.push_back(value_argument("op of dataType", operation + " of " + dtype));
    }
    call.arguments.push_back(value_argument("group", collective.communicator.name));
    return call;
}

HcclResult refused(const Call& call, const BrokenRule& rule) {
    const Argument* argument = call.find(rule.parameter);
    std::string message = call.title() + " on " + chip().soc + ": " + rule.text;
    if (argument != nullptr) {
        message = "EI0003: In [" + call.title() + "], value [" + argument->value + "] for parameter [" +
                  argument->name + "] is invalid. Reason: The collective communication operator has an invalid " +
                  "argument. Reason[" + rule.text + " on " + chip().soc + "]";
    }
    return static_cast<HcclResult>(fail_launch(HCCL_E_NOT_SUPPORT, message));
}

std::string describe_failure(const Collective& collective, const Failure& failure) {
    const bool lost = failure.code == HCCL_E_REMOTE || failure.code == HCCL_E_TIMEOUT;
    if (!lost) return failure.what();
    const Member& self = collective.communicator.self;
    return std::string("EI0002: The wait execution of the Notify register times out. Reason: The Notify register has "
                       "not received the Notify record: ") +
           failure.what() + ". base information: [tag[" + collective.name + "]]. group information: [group:[" +
           collective.communicator.name + "], rankSize[" + std::to_string(self.ranks) + "], rankId[" +
           std::to_string(self.rank) + "]]";
}

using Body = std::function<void(const Collective&)>;

void run(const Collective& collective, const Body& body) {
    Communicator& communicator = collective.communicator;
    {
        std::lock_guard<std::mutex> lock(communicator.guard);
        if (communicator.error != HCCL_SUCCESS) throw Failure(communicator.error, communicator.reason);
    }
    try {
        body(collective);
    } catch (const Failure& failure) {
        std::lock_guard<std::mutex> lock(communicator.guard);
        communicator.error = failure.code;
        communicator.reason = describe_failure(collective, failure);
        throw Failure(failure.code, communicator.reason);
    }
}

constexpr int32_t kNoReduction = HCCL_REDUCE_RESERVED;

// What a call to one of HCCL's functions says.
struct Request {
    const char* name;
    HcclCMDType kind;  // sends and receives are of one kind
    HcclComm communicator;
    HcclDataType type;
    int32_t reduction = kNoReduction;
    uint32_t root = 0;
    uint64_t count = 0;  // where all ranks have the same
};

HcclResult launch(const Request& request, const std::vector<Buffer>& buffers, Body body, aclrtStream stream) {
    const Shared communicator = find(request.communicator);
    if (communicator == nullptr) return no_communicator();
    if (request.root >= communicator->self.ranks) return fail_hccl(HCCL_E_PARA, "there is no such rank");
    try {
        const Signature signature = {request.kind, request.type, request.reduction, request.root, request.count};
        const Collective collective{request.name, *communicator, signature, from_hccl(request.type)};
        auto executor = std::make_unique<Executor>();
        executor->call = describe(collective, buffers, request.reduction != kNoReduction);
        if (const auto broken = broken_rule(executor->call)) return refused(executor->call, *broken);
        executor->run = [communicator, collective, body = std::move(body)] { run(collective, body); };
        return static_cast<HcclResult>(cann::launch(executor.release(), stream));
    } catch (const Failure& failure) {
        return static_cast<HcclResult>(fail_launch(failure.code, std::string(request.name) + ": " + failure.what()));
    }
}

uint32_t ranks_of(HcclComm handle) {
    const Shared communicator = find(handle);
    return communicator == nullptr ? 0 : communicator->self.ranks;
}

uint32_t rank_of(HcclComm handle) {
    const Shared communicator = find(handle);
    return communicator == nullptr ? 0 : communicator->self.rank;
}

Layout layout_of(const void* counts, const void* offsets, uint32_t ranks) {
    const auto *first = static_cast<const uint64_t*>(counts), *second = static_cast<const uint64_t*>(offsets);
    return {{first, first + ranks}, {second, second + ranks}};
}

}  // namespace
}  // namespace cann::hccl

using namespace cann::hccl;

CANN_API HcclResult HcclGetRootInfo(HcclRootInfo* root) {
    std::random_device random;
    RootInfo info = {};
    std::memcpy(info.magic, kMagic, sizeof kMagic);
    std::snprintf(info.id, sizeof info.id, "%08x%08x%08x%08x", random(), random(), random(), random());
    *root = {};
    std::memcpy(root->internal, &info, sizeof info);
    return HCCL_SUCCESS;
}

CANN_API HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo* root, uint32_t rank, HcclComm* comm) {
    return init(ranks, root, rank, nullptr, comm);
}

CANN_API HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo* root, uint32_t rank,
                                               const HcclCommConfig* config, HcclComm* comm) {
    return init(ranks, root, rank, config, comm);
}

// One more than the last setting that is honoured. Those before it that only concern speed have no effect.
CANN_API uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_EXEC_TIMEOUT + 1; }

CANN_API HcclResult HcclCommDestroy(HcclComm comm) {
    const Shared communicator = find(comm);
    if (communicator == nullptr) return no_communicator();
    {
        std::lock_guard<std::mutex> lock(guard);
        communicators().erase(comm);
    }
    communicator->mesh.close();
    return HCCL_SUCCESS;
}

CANN_API HcclResult HcclGetCommName(HcclComm comm, char* name) {
    const Shared communicator = find(comm);
    if (communicator == nullptr) return no_communicator();
    std::snprintf(name, COMM_NAME_MAX_LENGTH, "%s", communicator->name.c_str());
    return HCCL_SUCCESS;
}

CANN_API HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult* error) {
    const Shared communicator = find(comm);
    if (communicator == nullptr) return no_communicator();
    std::lock_guard<std::mutex> lock(communicator->guard);
    *error = static_cast<HcclResult>(communicator->error);
    if (*error != HCCL_SUCCESS) fail_hccl(*error, communicator->reason);  // torch_npu asks for the message next
    return HCCL_SUCCESS;
}

CANN_API HcclResult HcclSetConfig(HcclConfig setting, HcclConfigValue value) {
    std::lock_guard<std::mutex> lock(guard);
    settings[setting] = value;
    return HCCL_SUCCESS;
}

CANN_API HcclResult HcclGetConfig(HcclConfig setting, HcclConfigValue* value) {
    std::lock_guard<std::mutex> lock(guard);
    *value = settings[setting];
    return HCCL_SUCCESS;
}

CANN_API HcclResult HcclAllReduce(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op,
                                  HcclComm comm, aclrtStream stream) {
    return launch({"HcclAllReduce", HCCL_CMD_ALLREDUCE, comm, type, op, 0, count},
                  {{"sendBuf", send, count}, {"recvBuf", receive, count, true}},
                  [=](const Collective& call) { call.all_reduce(send, receive, count); }, stream);
}

CANN_API HcclResult HcclReduce(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op,
                               uint32_t root, HcclComm comm, aclrtStream stream) {
    return launch({"HcclReduce", HCCL_CMD_REDUCE, comm, type, op, root, count},
                  {{"sendBuf", send, count}, {"recvBuf", receive, count, rank_of(comm) == root}},
                  [=](const Collective& call) { call.reduce(send, receive, count); }, stream);
}

CANN_API HcclResult HcclBroadcast(void* buffer, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm,
                                  aclrtStream stream) {
    return launch({"HcclBroadcast", HCCL_CMD_BROADCAST, comm, type, kNoReduction, root, count},
                  {{"buf", buffer, count, rank_of(comm) != root}},
                  [=](const Collective& call) { call.broadcast(buffer, count); }, stream);
}

CANN_API HcclResult HcclScatter(void* send, void* receive, uint64_t count, HcclDataType type, uint32_t root,
                                HcclComm comm, aclrtStream stream) {
    return launch({"HcclScatter", HCCL_CMD_SCATTER, comm, type, kNoReduction, root, count},
                  {{"sendBuf", send, count * ranks_of(comm)}, {"recvBuf", receive, count, true}},
                  [=](const Collective& call) { call.scatter(send, receive, count); }, stream);
}

CANN_API HcclResult HcclAllGather(void* send, void* receive, uint64_t count, HcclDataType type, HcclComm comm,
                                  aclrtStream stream) {
    const Layout layout = Layout::even(count, ranks_of(comm));
    return launch({"HcclAllGather", HCCL_CMD_ALLGATHER, comm, type, kNoReduction, 0, count},
                  {{"sendBuf", send, count}, {"recvBuf", receive, layout.extent(), true}},
                  [=](const Collective& call) { call.all_gather(send, count, receive, layout); }, stream);
}

CANN_API HcclResult HcclAllGatherV(void* send, uint64_t count, void* receive, const void* counts, const void* offsets,
                                   HcclDataType type, HcclComm comm, aclrtStream stream) {
    const Layout layout = layout_of(counts, offsets, ranks_of(comm));
    return launch({"HcclAllGatherV", HCCL_CMD_ALLGATHER_V, comm, type},
                  {{"sendBuf", send, count}, {"recvBuf", receive, layout.extent(), true}},
                  [=](const Collective& call) { call.all_gather(send, count, receive, layout); }, stream);
}

CANN_API HcclResult HcclReduceScatter(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op,
                                      HcclComm comm, aclrtStream stream) {
    const Layout layout = Layout::even(count, ranks_of(comm));
    return launch({"HcclReduceScatter", HCCL_CMD_REDUCE_SCATTER, comm, type, op, 0, count},
                  {{"sendBuf", send, layout.extent()}, {"recvBuf", receive, count, true}},
                  [=](const Collective& call) { call.reduce_scatter(send, layout, receive); }, stream);
}

CANN_API HcclResult HcclReduceScatterV(void* send, const void* counts, const void* offsets, void* receive,
                                       uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm comm,
                                       aclrtStream stream) {
    const Layout layout = layout_of(counts, offsets, ranks_of(comm));
    return launch({"HcclReduceScatterV", HCCL_CMD_REDUCE_SCATTER_V, comm, type, op},
                  {{"sendBuf", send, layout.extent()}, {"recvBuf", receive, count, true}},
                  [=](const Collective& call) { call.reduce_scatter(send, layout, receive); }, stream);
}

static HcclResult all_to_all(const char* name, HcclCMDType kind, const void* send, const Layout& sent,
                             HcclDataType send_type, const void* receive, const Layout& received, HcclDataType type,
                             HcclComm comm, aclrtStream stream) {
    if (send_type != type) return fail_hccl(HCCL_E_PARA, "sendType and recvType must be the same");
    return launch({name, kind, comm, type},
                  {{"sendBuf", send, sent.extent()}, {"recvBuf", receive, received.extent(), true}},
                  [=](const Collective& call) { call.all_to_all(send, sent, const_cast<void*>(receive), received); },
                  stream);
}

CANN_API HcclResult HcclAlltoAll(const void* send, uint64_t send_count, HcclDataType send_type, const void* receive,
                                 uint64_t count, HcclDataType type, HcclComm comm, aclrtStream stream) {
    const uint32_t ranks = ranks_of(comm);
    return all_to_all("HcclAlltoAll", HCCL_CMD_ALLTOALL, send, Layout::even(send_count, ranks), send_type, receive,
                      Layout::even(count, ranks), type, comm, stream);
}

CANN_API HcclResult HcclAlltoAllV(const void* send, const void* send_counts, const void* send_offsets,
                                  HcclDataType send_type, const void* receive, const void* counts, const void* offsets,
                                  HcclDataType type, HcclComm comm, aclrtStream stream) {
    const uint32_t ranks = ranks_of(comm);
    return all_to_all("HcclAlltoAllV", HCCL_CMD_ALLTOALLV, send, layout_of(send_counts, send_offsets, ranks), send_type,
                      receive, layout_of(counts, offsets, ranks), type, comm, stream);
}

static HcclResult fail_peer(HcclComm comm, uint32_t peer) {
    const Shared communicator = find(comm);
    if (communicator == nullptr) return no_communicator();
    const bool other = peer < communicator->self.ranks && peer != communicator->self.rank;
    return other ? HCCL_SUCCESS : fail_hccl(HCCL_E_PARA, "rank " + std::to_string(peer) + " is no other rank");
}

CANN_API HcclResult HcclSend(void* buffer, uint64_t count, HcclDataType type, uint32_t to, HcclComm comm,
                             aclrtStream stream) {
    if (const HcclResult error = fail_peer(comm, to)) return error;
    return launch({"HcclSend", HCCL_CMD_SEND, comm, type, kNoReduction, 0, count}, {{"sendBuf", buffer, count}},
                  [=](const Collective& call) { call.send(buffer, count, to); }, stream);
}

CANN_API HcclResult HcclRecv(void* buffer, uint64_t count, HcclDataType type, uint32_t from, HcclComm comm,
                             aclrtStream stream) {
    if (const HcclResult error = fail_peer(comm, from)) return error;
    return launch({"HcclRecv", HCCL_CMD_SEND, comm, type, kNoReduction, 0, count}, {{"recvBuf", buffer, count, true}},
                  [=](const Collective& call) { call.receive(buffer, count, from); }, stream);
}

// Items of one call do not wait for each other. As no send waits at all, sending first is enough.
CANN_API HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, HcclComm comm, aclrtStream stream) {
    for (const HcclSendRecvType type : {HCCL_SEND, HCCL_RECV}) {
        for (const HcclSendRecvItem* item = items; item != items + count; ++item) {
            if (item->sendRecvType != type) continue;
            const auto call = type == HCCL_SEND ? HcclSend : HcclRecv;
            const HcclResult error = call(item->buf, item->count, item->dataType, item->remoteRank, comm, stream);
            if (error != HCCL_SUCCESS) return error;
        }
    }
    return HCCL_SUCCESS;
}

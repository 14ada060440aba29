#include "hccl/transport.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <memory>
#include <system_error>

#include "third_party/hccl/inc/hccl/hccl_types.h"

namespace cann::hccl {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kRetry = std::chrono::milliseconds(10);

struct Header {
    Signature signature;
    uint64_t bytes;
};

[[noreturn]] void fail_system(const char* what) {
    throw Failure(HCCL_E_SYSCALL, std::string(what) + ": " + std::generic_category().message(errno));
}

[[noreturn]] void fail_to_connect(const std::string& who) {
    throw Failure(HCCL_E_TIMEOUT, "EI0006: Getting socket times out. Reason: " + who +
                                      " did not connect within the time that HCCL_CONNECT_TIMEOUT sets");
}

int open_socket() {
    const int opened = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (opened < 0) fail_system("a socket cannot be opened");
    return opened;
}

struct Address {
    sockaddr_un name = {};
    socklen_t size;

    Address(const std::string& id, uint32_t rank) {
        const std::string text = "cann_emulator_hccl/" + id + "/" + std::to_string(rank);
        name.sun_family = AF_UNIX;
        text.copy(name.sun_path + 1, sizeof name.sun_path - 1);  // a zero first makes the name abstract
        size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
    }
    const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&name); }
};

struct Descriptor {
    int value;
    ~Descriptor() { ::close(value); }
};

// False when the other end is gone.
bool write_all(int socket, const void* data, size_t size) {
    for (auto* next = static_cast<const char*>(data); size > 0;) {
        const ssize_t written = ::send(socket, next, size, MSG_NOSIGNAL);
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return false;
        next += written;
        size -= static_cast<size_t>(written);
    }
    return true;
}

bool wait_readable(int descriptor, Clock::time_point deadline) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd entry = {descriptor, POLLIN, 0};
    return left > 0 && poll(&entry, 1, static_cast<int>(left)) == 1;
}

// A descriptor that becomes readable when the process behind the socket ends; -1 where the kernel has none. The end of
// the socket is not enough: children that the process has forked keep it open.
int open_process(int socket) {
    ucred peer = {};
    socklen_t size = sizeof peer;
    if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || peer.pid <= 0) return -1;
    return static_cast<int>(syscall(SYS_pidfd_open, peer.pid, 0));
}

}  // namespace

struct Mesh::Peer {
    int socket = -1;
    int process = -1;
    int32_t device = -1;
    bool gone = false;
    std::deque<Message> queue;
    Header header = {};   // of the message that is arriving
    size_t arrived = 0;   // of its header and content
    std::vector<char> content;
    std::unique_ptr<std::mutex> sending = std::make_unique<std::mutex>();
};

Mesh::Mesh(const std::string& id, const Member& self, Seconds timeout) : peers_(self.ranks) {
    const auto deadline = Clock::now() + timeout;
    const Descriptor listener{open_socket()};
    const Address address(id, self.rank);
    const int backlog = static_cast<int>(self.ranks);
    if (bind(listener.value, address.get(), address.size) != 0 || listen(listener.value, backlog) != 0) {
        throw Failure(HCCL_E_PARA, "rank " + std::to_string(self.rank) + " is in the communicator already");
    }
    peers_[self.rank].device = self.device;
    try {
        connect_lower(id, self, deadline);
        accept_higher(listener.value, self, deadline);
        check_devices(self);
        wake_ = eventfd(0, EFD_CLOEXEC);
        if (wake_ < 0) fail_system("an event cannot be made");
    } catch (...) {
        for (const Peer& peer : peers_) {
            if (peer.socket >= 0) ::close(peer.socket);
            if (peer.process >= 0) ::close(peer.process);
        }
        throw;
    }
    reader_ = std::thread([this] { read_all(); });
}

Mesh::~Mesh() {
    close();
    reader_.join();
    for (const Peer& peer : peers_) {
        if (peer.socket >= 0) ::close(peer.socket);
        if (peer.process >= 0) ::close(peer.process);
    }
    ::close(wake_);
}

void Mesh::connect_lower(const std::string& id, const Member& self, Clock::time_point deadline) {
    for (uint32_t rank = 0; rank < self.rank; ++rank) {
        const int opened = open_socket();
        const Address address(id, rank);
        while (connect(opened, address.get(), address.size) != 0) {
            if (Clock::now() > deadline) {
                ::close(opened);
                fail_to_connect("remote rank " + std::to_string(rank));
            }
            std::this_thread::sleep_for(kRetry);  // it does not listen yet
        }
        admit(opened, self, deadline);
    }
}

void Mesh::accept_higher(int listener, const Member& self, Clock::time_point deadline) {
    for (uint32_t left = self.ranks - self.rank - 1; left > 0; --left) {
        if (!wait_readable(listener, deadline)) {
            fail_to_connect(std::to_string(left) + " of " + std::to_string(self.ranks) + " ranks");
        }
        const int accepted = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        if (accepted < 0) fail_system("a rank cannot be accepted");
        admit(accepted, self, deadline);
    }
}

// Learns who is behind a new connection.
void Mesh::admit(int socket, const Member& self, Clock::time_point deadline) {
    Member other = {};
    const bool answered = write_all(socket, &self, sizeof self) && wait_readable(socket, deadline) &&
                          recv(socket, &other, sizeof other, MSG_WAITALL) == sizeof other;
    if (!answered || other.ranks != self.ranks || other.rank >= self.ranks || peers_[other.rank].device >= 0) {
        ::close(socket);
        if (!answered) fail_to_connect("a remote rank");
        throw Failure(HCCL_E_PARA, "EI0005: The arguments for collective communication are inconsistent between ranks: "
                                   "tag [init], parameter [nRanks and rank], local [" + std::to_string(self.ranks) +
                                       ", " + std::to_string(self.rank) + "], remote [" + std::to_string(other.ranks) +
                                       ", " + std::to_string(other.rank) + "]");
    }
    peers_[other.rank].socket = socket;
    peers_[other.rank].process = open_process(socket);
    peers_[other.rank].device = other.device;
}

// Only now: all ranks are connected, so that all of them find the same error.
void Mesh::check_devices(const Member& self) const {
    for (uint32_t first = 0; first < self.ranks; ++first) {
        for (uint32_t second = first + 1; second < self.ranks; ++second) {
            if (peers_[first].device != peers_[second].device) continue;
            throw Failure(HCCL_E_PARA, "rank [" + std::to_string(first) + "] and rank [" + std::to_string(second) +
                                           "] have the same device id [" + std::to_string(peers_[first].device) +
                                           "]: each rank needs a device of its own");
        }
    }
}

void Mesh::send(uint32_t rank, const Signature& signature, const void* content, size_t bytes) {
    Peer& peer = peers_[rank];
    const Header header = {signature, bytes};
    std::lock_guard<std::mutex> lock(*peer.sending);
    if (write_all(peer.socket, &header, sizeof header) && write_all(peer.socket, content, bytes)) return;
    std::lock_guard<std::mutex> state(guard_);
    if (closed_) throw Failure(HCCL_E_SUSPENDING, "the communicator was destroyed");
    throw Failure(HCCL_E_REMOTE, "remote rank: [" + std::to_string(rank) + "] is gone");
}

Message Mesh::receive(uint32_t rank, Seconds timeout) {
    Peer& peer = peers_[rank];
    std::unique_lock<std::mutex> lock(guard_);
    const auto ready = [&] { return !peer.queue.empty() || peer.gone || closed_; };
    if (timeout == Seconds(0)) {
        changed_.wait(lock, ready);
    } else if (!changed_.wait_for(lock, timeout, ready)) {
        throw Failure(HCCL_E_TIMEOUT, "remote rank: [" + std::to_string(rank) + "] sent nothing for " +
                                          std::to_string(timeout.count()) + " s");
    }
    if (closed_) throw Failure(HCCL_E_SUSPENDING, "the communicator was destroyed");
    if (peer.queue.empty()) throw Failure(HCCL_E_REMOTE, "remote rank: [" + std::to_string(rank) + "] is gone");
    Message message = std::move(peer.queue.front());
    peer.queue.pop_front();
    return message;
}

void Mesh::close() {
    std::lock_guard<std::mutex> lock(guard_);
    if (closed_) return;
    closed_ = true;
    changed_.notify_all();
    for (const Peer& peer : peers_) {
        if (peer.socket >= 0) shutdown(peer.socket, SHUT_RDWR);  // what was sent before still arrives
    }
    if (eventfd_write(wake_, 1) != 0) die("the reader of a communicator cannot be woken");
}

void Mesh::read_all() {
    std::vector<pollfd> entries(2 * peers_.size() + 1);
    while (true) {
        for (size_t i = 0; i < peers_.size(); ++i) {
            const Peer& peer = peers_[i];
            entries[2 * i] = {peer.gone ? -1 : peer.socket, POLLIN, 0};  // poll ignores negative ones
            entries[2 * i + 1] = {peer.gone ? -1 : peer.process, POLLIN, 0};
        }
        entries.back() = {wake_, POLLIN, 0};
        if (poll(entries.data(), entries.size(), -1) < 0 && errno != EINTR) die("poll of a communicator failed");
        if (entries.back().revents != 0) return;
        for (size_t i = 0; i < peers_.size(); ++i) {
            const bool ended = entries[2 * i + 1].revents != 0;
            if (ended || entries[2 * i].revents != 0) read(peers_[i], ended);
        }
    }
}

// Takes what has arrived from one rank; all that there will ever be of a process that has ended.
void Mesh::read(Peer& peer, bool to_the_end) {
    do {
        const bool in_header = peer.arrived < sizeof peer.header;
        char* target = in_header ? reinterpret_cast<char*>(&peer.header) : peer.content.data();
        const size_t there = in_header ? peer.arrived : peer.arrived - sizeof peer.header;
        const size_t size = in_header ? sizeof peer.header : peer.content.size();
        const ssize_t count = recv(peer.socket, target + there, size - there, MSG_DONTWAIT);
        if (count < 0 && (errno == EINTR || (errno == EAGAIN && !to_the_end))) return;
        if (count <= 0) {
            std::lock_guard<std::mutex> lock(guard_);
            peer.gone = true;
            changed_.notify_all();
            return;
        }
        peer.arrived += static_cast<size_t>(count);
        if (peer.arrived == sizeof peer.header) peer.content.resize(peer.header.bytes);
        if (peer.arrived == sizeof peer.header + peer.header.bytes) {
            std::lock_guard<std::mutex> lock(guard_);
            peer.queue.push_back({peer.header.signature, std::move(peer.content)});
            peer.content = {};
            peer.arrived = 0;
            changed_.notify_all();
        }
    } while (to_the_end);
}

}  // namespace cann::hccl

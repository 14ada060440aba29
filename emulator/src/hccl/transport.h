// The connections of one communicator: a Unix socket to each other rank, and a thread that reads them all.
//
// As that thread always reads, sending never waits for the receiver, and ranks that send to each other at the same
// time cannot block each other. The sockets have abstract names: nothing is left behind by a process that was killed.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "runtime/runtime.h"

namespace cann::hccl {

using Seconds = std::chrono::seconds;

// What the ranks of a collective must agree on.
struct Signature {
    int32_t operation;
    int32_t data_type;
    int32_t reduction;
    uint32_t root;
    uint64_t count;
};

struct Message {
    Signature signature;
    std::vector<char> content;
};

struct Member {
    uint32_t rank;
    uint32_t ranks;
    int32_t device;  // the machine's number: each process may call its own device 0
};

class Mesh {
public:
    // Connects with all other ranks that were given `id`. Throws Failure.
    Mesh(const std::string& id, const Member& self, Seconds timeout);
    ~Mesh();

    // Both throw Failure with HCCL_E_REMOTE when that rank is gone, and with HCCL_E_SUSPENDING after close().
    void send(uint32_t rank, const Signature& signature, const void* content, size_t bytes);
    Message receive(uint32_t rank, Seconds timeout);  // HCCL_E_TIMEOUT when nothing comes; 0 seconds wait forever

    // Hangs up; ends sends and receives of other threads.
    void close();

private:
    struct Peer;

    void connect_lower(const std::string& id, const Member& self, std::chrono::steady_clock::time_point deadline);
    void accept_higher(int listener, const Member& self, std::chrono::steady_clock::time_point deadline);
    void admit(int socket, const Member& self, std::chrono::steady_clock::time_point deadline);
    void check_devices(const Member& self) const;
    void read_all();
    void read(Peer& peer, bool to_the_end);

    std::vector<Peer> peers_;  // by rank; the own one stays unconnected
    std::mutex guard_;         // of the peers' queues and of closed_
    std::condition_variable changed_;
    bool closed_ = false;
    int wake_ = -1;
    std::thread reader_;
};

}  // namespace cann::hccl

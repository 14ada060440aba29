// The pure parts of the check for races, one command a line, for test_races.py:
//
//     overlap BEGIN WIDTH DIMENSIONS [COUNT STRIDE]... BEGIN WIDTH DIMENSIONS [COUNT STRIDE]...   prints 0 or 1
//     launch STREAM WRITES BEGIN WIDTH DIMENSIONS [COUNT STRIDE]...   prints the numbers of the launches it races with
//     record EVENT STREAM / wait STREAM EVENT / synchronize_event EVENT / synchronize_device DEVICE
//     forget BEGIN BYTES
//
// Streams 0 and 1 are of device 0, the others of device 1.
#include <iostream>
#include <sstream>

#include "races/history.h"

using namespace cann::races;

namespace {

Timelines timelines;
History history;
std::map<int, Clock> events;
int launched = 0;

int device_of(int stream) { return stream / 2; }

Footprint read_footprint(std::istream& in) {
    size_t begin, width, count;
    in >> begin >> width >> count;
    std::vector<Dimension> dimensions(count);
    for (Dimension& each : dimensions) in >> each.count >> each.stride;
    return Footprint::of(reinterpret_cast<void*>(begin), width, dimensions);
}

void launch(std::istream& in) {
    int stream;
    bool writes;
    in >> stream >> writes;
    Clock& clock = timelines.of(stream, device_of(stream));
    clock.advance(stream);
    const auto task = std::make_shared<Task>(Task{std::to_string(launched++), "", device_of(stream), stream, clock.of(stream)});
    const auto access = std::make_shared<const Access>(Access{task, "", read_footprint(in), writes});
    for (const auto& other : history.add(access, clock, timelines.host())) std::cout << other->task->title << ' ';
    std::cout << '\n';
}

void obey(const std::string& command, std::istream& in) {
    int first, second;
    if (command == "overlap") {
        const Footprint a = read_footprint(in), b = read_footprint(in);
        std::cout << overlap(a, b) << '\n';
        return;
    }
    if (command == "launch") return launch(in);
    in >> first >> second;
    if (command == "record") events[first] = timelines.of(second, device_of(second));
    if (command == "wait") timelines.of(first, device_of(first)).join(events[second]);
    if (command == "synchronize_event") timelines.wait_on_host(events[first]);
    if (command == "synchronize_device") timelines.wait_on_host(first);
    if (command == "forget") history.forget(first, second);
}

}  // namespace

int main() {
    for (std::string line, command; std::getline(std::cin, line);) {
        std::istringstream in(line);
        in >> command;
        obey(command, in);
    }
}

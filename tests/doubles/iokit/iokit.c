/* A stand-in for the parts of IOKit and CoreFoundation that tell of sleep and wake: same names, same signatures,
 * and the same rules as far as they matter: a stop of a run loop that does not run is lost, a signalled source is
 * not; a run loop without sources does not run, and ends with its thread; what is destroyed must not be used.
 *
 * Every call is recorded with its thread. Functions called double_… are the test's own. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int32_t IOReturn;
typedef uint32_t io_connect_t, io_object_t, io_service_t;
typedef void (*IOServiceInterestCallback)(void *refcon, io_service_t service, uint32_t message, void *argument);

typedef struct {
	long version;
	void *info;
	const void *(*retain)(const void *);
	void (*release)(const void *);
	void *copy_description, *equal, *hash, *schedule, *cancel;
	void (*perform)(void *info);
} SourceContext;

typedef struct Port Port;
typedef struct RunLoop RunLoop;
typedef struct {
	SourceContext context;
	int signalled, released;
	Port *port;
	RunLoop *loop;
} Source;
struct RunLoop {
	int running, stopped, awake, ended;
	Source *sources[8];
};
struct Port {
	IOServiceInterestCallback callback;
	void *refcon;
	Source source;
};
typedef struct {
	const char *name;
	uint64_t first, second;
	uintptr_t thread;
} Record;

enum { ROOT = 0x80001234, NOTIFIER = 0xF00D0001, SERVICE = 0x90000017, MAX = 4096 };

const void *const kCFRunLoopDefaultMode = "kCFRunLoopDefaultMode";

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static pthread_key_t run_loop_key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static Record records[MAX];
static struct {
	uint32_t message;
	int64_t id;
} queue[MAX];
static int recorded, posted, delivered;
static int refuse_registration, connected, notifying, sources_made, at_gate;
static IOReturn allow_status;
static Port *registered;
static const char *gate = "";

static void note(const char *name, uint64_t first, uint64_t second)
{
	if (recorded < MAX) records[recorded++] = (Record){name, first, second, (uintptr_t)pthread_self()};
}

static void enter(const char *name, uint64_t first, uint64_t second)
{
	pthread_mutex_lock(&lock);
	note(name, first, second);
	if (strcmp(gate, name) != 0) return;
	at_gate = 1;
	pthread_cond_broadcast(&changed);
	while (strcmp(gate, name) == 0) pthread_cond_wait(&changed, &lock);
	at_gate = 0;
}

static void leave(void)
{
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
}

static void require(int right, const char *misuse)
{
	if (!right) note(misuse, 0, 0);
}

/* --- CoreFoundation */

/* what is gone is kept, so that using it can be told */
static void end_run_loop(void *loop) { ((RunLoop *)loop)->ended = 1; }
static void make_key(void) { pthread_key_create(&run_loop_key, end_run_loop); }

RunLoop *CFRunLoopGetCurrent(void)
{
	pthread_once(&once, make_key);
	enter("CFRunLoopGetCurrent", 0, 0);
	RunLoop *loop = pthread_getspecific(run_loop_key);
	if (!loop) {
		loop = calloc(1, sizeof *loop);
		pthread_setspecific(run_loop_key, loop);
	}
	leave();
	return loop;
}

Source *CFRunLoopSourceCreate(const void *allocator, long order, const SourceContext *context)
{
	enter("CFRunLoopSourceCreate", (uint64_t)(uintptr_t)allocator, (uint64_t)order);
	Source *source = calloc(1, sizeof *source);
	source->context = *context;
	require(context->version == 0 && !context->retain && !context->release, "misuse: odd context");
	sources_made++;
	leave();
	return source;
}

static void detach(Source *source)
{
	if (!source->loop) return;
	for (int i = 0; i < 8; i++)
		if (source->loop->sources[i] == source) source->loop->sources[i] = NULL;
	source->loop = NULL;
}

void CFRunLoopSourceInvalidate(Source *source)
{
	enter("CFRunLoopSourceInvalidate", 0, 0);
	detach(source);
	leave();
}

void CFRelease(Source *source)
{
	enter("CFRelease", 0, 0);
	require(!source->loop, "misuse: a source was released that a run loop still has");
	require(!source->released, "misuse: released twice");
	source->released = 1;
	sources_made--;
	leave();
}

void CFRunLoopAddSource(RunLoop *loop, Source *source, const void *mode)
{
	enter("CFRunLoopAddSource", 0, 0);
	require(mode == kCFRunLoopDefaultMode, "misuse: unknown mode");
	require(pthread_getspecific(run_loop_key) == loop, "misuse: a run loop of another thread");
	for (int i = 0; i < 8; i++) {
		if (loop->sources[i]) continue;
		loop->sources[i] = source;
		source->loop = loop;
		break;
	}
	leave();
}

void CFRunLoopRemoveSource(RunLoop *loop, Source *source, const void *mode)
{
	enter("CFRunLoopRemoveSource", 0, 0);
	require(mode == kCFRunLoopDefaultMode && source->loop == loop, "misuse: not that loop's source");
	detach(source);
	leave();
}

void CFRunLoopSourceSignal(Source *source)
{
	enter("CFRunLoopSourceSignal", 0, 0);
	require(!source->released, "misuse: signalled after its release");
	source->signalled = 1;
	leave();
}

void CFRunLoopWakeUp(RunLoop *loop)
{
	enter("CFRunLoopWakeUp", 0, 0);
	require(!loop->ended, "misuse: a run loop of a thread that has ended");
	loop->awake = 1;
	leave();
}

void CFRunLoopStop(RunLoop *loop)
{
	enter("CFRunLoopStop", 0, 0);
	if (loop->running) loop->stopped = loop->awake = 1;
	leave();
}

/* Performs one source that has something to do; whether there was one. Called, and returns, with the lock held. */
static int perform_one(RunLoop *loop)
{
	for (int i = 0; i < 8; i++) {
		Source *source = loop->sources[i];
		if (source && source->signalled) {
			SourceContext context = source->context;
			source->signalled = 0;
			pthread_mutex_unlock(&lock);
			if (context.perform) context.perform(context.info);
			pthread_mutex_lock(&lock);
			return 1;
		}
		if (source && source->port && delivered < posted) {
			Port *port = source->port;
			uint32_t message = queue[delivered].message;
			int64_t id = queue[delivered++].id;
			pthread_mutex_unlock(&lock);
			port->callback(port->refcon, SERVICE, message, (void *)(intptr_t)id);
			pthread_mutex_lock(&lock);
			note("returned", message, (uint64_t)id);
			return 1;
		}
	}
	return 0;
}

static int has_sources(const RunLoop *loop)
{
	for (int i = 0; i < 8; i++)
		if (loop->sources[i]) return 1;
	return 0;
}

void CFRunLoopRun(void)
{
	enter("CFRunLoopRun", 0, 0);
	RunLoop *loop = pthread_getspecific(run_loop_key);
	loop->running = 1;
	loop->stopped = 0;
	while (!loop->stopped && has_sources(loop)) {
		if (perform_one(loop)) continue;
		/* a source that is signalled does not wake the loop, CFRunLoopWakeUp does */
		loop->awake = 0;
		while (!loop->awake && delivered == posted) pthread_cond_wait(&changed, &lock);
	}
	loop->running = 0;
	note("run loop ended", 0, 0);
	leave();
}

/* --- IOKit */

io_connect_t IORegisterForSystemPower(void *refcon, Port **port, IOServiceInterestCallback callback,
                                      io_object_t *notifier)
{
	enter("IORegisterForSystemPower", 0, 0);
	if (refuse_registration) {
		leave();
		return 0;
	}
	registered = *port = calloc(1, sizeof **port);
	registered->callback = callback;
	registered->refcon = refcon;
	registered->source.port = registered;
	*notifier = NOTIFIER;
	connected = notifying = 1;
	leave();
	return ROOT;
}

Source *IONotificationPortGetRunLoopSource(Port *port)
{
	enter("IONotificationPortGetRunLoopSource", 0, 0);
	require(port && port == registered, "misuse: unknown port");
	leave();
	return &port->source;
}

IOReturn IOAllowPowerChange(io_connect_t root, intptr_t notification)
{
	enter("IOAllowPowerChange", root, (uint64_t)notification);
	require(root == ROOT && connected, "misuse: unknown connection");
	leave();
	return allow_status;
}

IOReturn IODeregisterForSystemPower(io_object_t *notifier)
{
	enter("IODeregisterForSystemPower", *notifier, 0);
	require(*notifier == NOTIFIER && notifying && connected && registered, "misuse: deregistered too late");
	notifying = 0;
	leave();
	return 0;
}

IOReturn IOServiceClose(io_connect_t root)
{
	enter("IOServiceClose", root, 0);
	require(root == ROOT && connected && !notifying && registered, "misuse: closed at the wrong time");
	connected = 0;
	leave();
	return 0;
}

void IONotificationPortDestroy(Port *port)
{
	enter("IONotificationPortDestroy", 0, 0);
	require(port && port == registered && !connected && !notifying, "misuse: destroyed at the wrong time");
	detach(&port->source);
	free(port);
	registered = NULL;
	leave();
}

/* --- the test's own */

void double_reset(void)
{
	pthread_mutex_lock(&lock);
	recorded = posted = delivered = refuse_registration = 0;
	allow_status = 0;
	gate = "";
	leave();
}

void double_refuse_registration(void) { refuse_registration = 1; }
void double_allow_fails(IOReturn status) { allow_status = status; }

/* The system says something, at any time and from any thread. */
void double_post(uint32_t message, int64_t id)
{
	pthread_mutex_lock(&lock);
	queue[posted].message = message;
	queue[posted++].id = id;
	leave();
}

/* From now on a call of that name waits, until another name is given. The name must stay where it is. */
void double_gate(const char *name)
{
	pthread_mutex_lock(&lock);
	gate = name;
	leave();
}

int double_at_gate(void)
{
	pthread_mutex_lock(&lock);
	int is = at_gate;
	leave();
	return is;
}

int double_records(Record *into)
{
	pthread_mutex_lock(&lock);
	memcpy(into, records, sizeof *into * (size_t)recorded);
	int count = recorded;
	leave();
	return count;
}

/* How much has been made and not destroyed. */
int double_left(void)
{
	pthread_mutex_lock(&lock);
	int left = sources_made + connected + notifying + (registered != NULL);
	leave();
	return left;
}

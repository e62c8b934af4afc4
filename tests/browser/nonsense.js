// What a page can do to a server over channels of a connection that is otherwise sound: `address` is the server's.
// Returns how many of the channels were closed on the page, once the same connection has served a call after all that.
const names = ['connection', 'identity', 'rpc', 'signalling']
const [{ Connection }, { Identity }, { call }, { Signalling, parseAddress }] =
  await Promise.all(names.map(name => import(`/${name}.js`)))

let rtc // of the connection, to open channels without our protocol on them
const Plain = RTCPeerConnection
window.RTCPeerConnection = class extends Plain {
  constructor (...all) {
    super(...all)
    rtc = this
  }
}
const { url, peer } = parseAddress(address)
const connection = await Connection.dial(peer, await Signalling.connect(url, await Identity.generate()))
window.RTCPeerConnection = Plain

const frame = (kind, length, value, ...body) => {
  const bytes = new Uint8Array(9 + body.length)
  const view = new DataView(bytes.buffer)
  view.setUint8(0, kind)
  view.setUint32(1, length, true)
  view.setUint32(5, value, true)
  bytes.set(body, 9)
  return bytes
}
const settings = new Uint8Array(new Uint32Array([2 ** 20, 2 ** 20, 10_000]).buffer)
const hello = frame(1, 12, 0, ...settings)
const open = frame(3, 0, 0)
const noise = new Uint8Array(16384).fill(0xff)
const refused = [
  [noise],
  Array(100).fill(noise),
  [open],
  [frame(1, 12, 0, ...new Uint8Array(12))], // grants nothing
  [hello, noise],
  [hello, hello],
  [hello, frame(77, 0, 0)],
  [hello, open, open],
  [hello, open, frame(4, 2 ** 32 - 1, 2 ** 32 - 1)],
  [hello, open, frame(4, 1, 2 ** 32 - 1, 1)],
  [hello, open, frame(5, 4, 0, 1, 2, 3, 4)] // more of no message
]
const closed = refused.map(messages => new Promise(resolve => {
  const channel = rtc.createDataChannel('/swarmcore/stream/1')
  channel.onopen = () => messages.forEach(one => channel.readyState === 'open' && channel.send(one))
  channel.onclose = resolve
}))
await Promise.all(closed)

const answered = new Promise(resolve => {
  const channel = rtc.createDataChannel('/swarmcore/stream/1')
  const message = [255, 255, 255, 255, 1, 2, 3, 4] // a message with a header that is longer than itself
  channel.onopen = () => [hello, open, frame(4, 8, 8, ...message)].forEach(one => channel.send(one))
  channel.onmessage = async ({ data }) => {
    const bytes = new Uint8Array(data instanceof Blob ? await data.arrayBuffer() : data)
    if (new TextDecoder().decode(bytes).includes('ProtocolError')) resolve()
  }
})
await answered

const words = rtc.createDataChannel('another protocol')
words.onopen = () => words.send('good morning')
const stream = await connection.openStream()
await call(stream, '/swarmcore/ping/1', 'Ping', { payload: noise }, 'Pong', 10)
connection.close()
return closed.length

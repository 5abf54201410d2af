-- Hands each image that arrives to the gateway. Results come back by the same way and are passed over here; were they
-- not, the gateway would drop them.
function OnStoredInstance(instanceId, tags, metadata, origin)
  if origin['RequestOrigin'] == 'DicomProtocol' and origin['RemoteAet'] == 'CAMSERVE' then
    return
  end
  SendToModality(instanceId, 'gateway')
end
